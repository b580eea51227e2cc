"""Transformers + peft beside ours: the network that bench.py measures, and for compare.py one that is trained on the
same examples in the same order by the same rule, in batches as it wants them: padded."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.report import Diverged
from finetune.run import Run, Train, batches, learning_rate
from lit_model.data.labels import Task, Verdict, numbers
from lit_model.families import PRESETS
from lit_model.packing import Example


def padded(batch: Sequence[Example], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of this many examples, as transformers takes them: (size, longest) each."""
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        ids = torch.zeros(len(part), max(len(e.ids) for e in part), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, e in enumerate(part):
            n, first = len(e.ids), e.first_target
            ids[i, :n], mask[i, :n] = torch.from_numpy(e.ids), 1
            labels[i, first:n] = torch.from_numpy(e.ids[first:])
        yield dict(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))


def random_network(preset: str, dtype: torch.dtype, device: torch.device, use_cache: bool = False) -> torch.nn.Module:
    """transformers' network of this shape, with random weights."""
    shape = AutoConfig.for_model(**PRESETS[preset], use_cache=use_cache)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="sdpa")


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """transformers' network with the weights of a checkpoint folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)


def to_nf4(network: torch.nn.Module) -> None:
    """Quantizes the linear layers of all blocks by bitsandbytes, as QLoRA does."""
    from bitsandbytes.nn import Linear4bit

    how = dict(bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
    modules = [(parent, *child) for parent in network.model.modules() for child in parent.named_children()]
    for parent, name, linear in modules:
        if isinstance(linear, torch.nn.Linear):
            quantized = Linear4bit(linear.in_features, linear.out_features, **how)
            quantized.load_state_dict({"weight": linear.weight.cpu()})
            setattr(parent, name, quantized.to(linear.weight.device))


def attach(network: torch.nn.Module, method: str, options: Any) -> torch.nn.Module:
    """peft's form of a method, with our options. Raises ValueError for a method that peft does not have."""
    if method == "adapter":
        layers = network.config.num_hidden_layers - options.start_layer
        chosen = peft.AdaptionPromptConfig(adapter_len=options.prompt_length, adapter_layers=layers)
    elif method in ("lora", "dora"):
        shape = dict(r=options.r, lora_alpha=options.alpha, target_modules=options.targets.split(","))
        chosen = peft.LoraConfig(**shape, use_dora=method == "dora")
    elif method == "ia3":
        chosen = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    elif method in ("prefix", "prompt"):
        kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
        chosen = kind(num_virtual_tokens=options.length)
    else:
        raise ValueError(f"peft has no {method}")
    chosen.task_type = "CAUSAL_LM"
    network = peft.get_peft_model(network, chosen)
    for p in network.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return network.train()


def losses(network: torch.nn.Module, examples: list[Example], size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Cross-entropy summed over the targets of each micro-batch, divided by the number of all targets."""
    n_targets = sum(e.n_targets for e in examples)
    for tensors in padded(examples, size, network.device):
        with torch.autocast(network.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = network(**tensors, num_items_in_batch=n_targets).loss
        yield loss


def train_step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list[Example], size: int, dtype: torch.dtype
) -> float:
    """One update, from micro-batches of this size. Returns the loss."""
    total = 0.0
    for loss in losses(network, batch, size, dtype):
        loss.backward()
        total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, Train.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def fit(network: torch.nn.Module, run: Run) -> tuple[float, float, int]:
    """Trains what requires gradients as our loop does: the same batches, learning rates, optimizer and loss. Keeps the
    weights of least validation loss.

    Returns (validation loss, seconds of training, tokens). Raises Diverged.
    """
    train, trained = run.options.train, [p for p in network.parameters() if p.requires_grad]
    groups = defaultdict(list)
    for p in trained:
        groups[train.weight_decay * (p.squeeze().ndim > 1)].append(p)  # peft's vectors are matrices of one row
    settings = [dict(params=params, weight_decay=decay) for decay, params in groups.items()]
    optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.95), fused=True)
    best, best_values, seconds, n_tokens = math.inf, None, 0.0, 0
    start = time.perf_counter()
    for number, batch in enumerate(islice(batches(run.train_examples, train), run.n_steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, run.n_steps, run.n_steps // 10, train.lr)
        train_step(network, optimizer, batch, len(batch), run.dtype)
        n_tokens += sum(len(e.ids) for e in batch)
        if number % train.eval_interval == 0 or number == run.n_steps:
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            network.eval()
            with torch.no_grad():
                val_loss = sum(loss.item() for loss in losses(network, run.val_examples, 16, run.dtype))
            network.train()
            if not math.isfinite(val_loss):
                raise Diverged(f"validation loss {val_loss} at step {number}: try a lower learning rate")
            if val_loss < best:
                best, best_values = val_loss, [p.detach().clone() for p in trained]
            start = time.perf_counter()
    with torch.no_grad():
        for p, value in zip(trained, best_values, strict=True):
            p.copy_(value)
    return best, seconds, n_tokens


@torch.no_grad()
def judge(
    network: torch.nn.Module, examples: Sequence[Example], task: Task, labels: list[list[int]], run: Run
) -> Verdict:
    """As data/score.py: the label with the highest log-probability after the prompt wins."""
    network.eval()
    scores = torch.zeros(len(labels), len(examples))
    for k, label in enumerate(labels):
        asked = [Example(np.append(e.ids[: e.first_target], label), e.first_target) for e in examples]
        for i, tensors in enumerate(padded(asked, 16, network.device)):
            targets = tensors.pop("labels")[:, 1:]
            with torch.autocast(network.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
                logits = network(**tensors).logits[:, -targets.shape[1] - 1 : -1]  # without those of virtual tokens
            costs = torch.nn.functional.cross_entropy(logits.mT.float(), targets, reduction="none")
            scores[k, 16 * i : 16 * i + 16] = -costs.sum(1).cpu()
    truth = [task.classes[i] for i in numbers(examples, labels)]
    return Verdict(truth, [task.classes[i] for i in scores.argmax(0).tolist()], task.classes)
