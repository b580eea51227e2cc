"""Transformers + peft beside ours: the network that bench.py measures, and for compare.py one that is trained on the
same examples in the same order by the same rule, in batches as it wants them: padded."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune import loop, setup
from lit_model.data import labels as classify
from lit_model.weights import folder as convert
from lit_model import model
from lit_model.load import read_tensors
from lit_model.packing import Example


def padded(batch: list[Example], micro: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(batch), micro):
        part = batch[start : start + micro]
        ids = torch.zeros(len(part), max(len(e.ids) for e in part), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, e in enumerate(part):
            n, first = len(e.ids), e.first_target
            ids[i, :n], mask[i, :n] = torch.from_numpy(e.ids), 1
            labels[i, first:n] = torch.from_numpy(e.ids[first:])
        yield {k: t.to(device) for k, t in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


def build(method: str, precision: str, config: model.Config, device: torch.device) -> torch.nn.Module:
    """The same shape and method there, with random weights. `config` is that of our network with the method in it.

    Raises ValueError for a method that peft does not have.
    """
    dtype = torch.float32 if precision == "fp32" or method == "full" else torch.bfloat16
    network = base(config, dtype, device)
    if precision == "nf4":
        from bitsandbytes.nn import Linear4bit

        for block in network.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        quantized = Linear4bit(
                            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                            compress_statistics=True, quant_type="nf4",
                        )  # fmt: skip
                        quantized.load_state_dict({"weight": linear.weight.cpu()})
                        setattr(parent, name, quantized.to(device))
    return network.train() if method == "full" else attach(network, method, config)


def base(config: model.Config, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Random weights. Raises ValueError for a shape that is no LLaMA's."""
    if config.arch != "llama" or config.bias:
        raise ValueError("transformers' LLaMA is the only peer here, and it has no biases")
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_size,
        max_position_embeddings=config.block_size,
        rope_theta=config.rope_base,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie,
        use_cache=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="sdpa")


def copy_weights(network: torch.nn.Module, checkpoint_dir: Path) -> None:
    """Puts the weights of a checkpoint of ours into a network of theirs of that shape."""
    ours = read_tensors(checkpoint_dir / "lit_model.safetensors")
    with torch.no_grad():
        for name, t in convert.hf_llama_tensors(network.state_dict().items()):
            t.copy_(ours.get(name, ours["wte.weight"]))  # a tied head is not in the file


def attach(network: torch.nn.Module, method: str, config: model.Config) -> torch.nn.Module:
    """Raises ValueError for a method that peft does not have."""
    if method == "adapter":
        layers = config.n_layer - config.adapter.start_layer
        chosen = peft.AdaptionPromptConfig(adapter_len=config.adapter.prompt_length, adapter_layers=layers)
    elif method in ("lora", "lora-all", "dora", "dora-all"):
        ours, targets = config.lora, config.lora.targets.split(",")
        chosen = peft.LoraConfig(r=ours.r, lora_alpha=ours.alpha, target_modules=targets, use_dora=ours.dora)
    elif method == "ia3":
        chosen = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    elif method == "prefix":
        chosen = peft.PrefixTuningConfig(num_virtual_tokens=config.prefix.length)
    elif method == "prompt":
        chosen = peft.PromptTuningConfig(num_virtual_tokens=config.prompt.length)
    else:
        raise ValueError(f"peft has no {method}")
    chosen.task_type = "CAUSAL_LM"
    network = peft.get_peft_model(network, chosen)
    for p in network.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return network.train()


def fit(network: torch.nn.Module, run: setup.Run) -> tuple[float, float, int]:
    """Trains what requires gradients as loop.fit does with ours: the same batches, learning rates, optimizer and loss.
    Keeps the state of least validation loss.

    Returns (validation loss, seconds of training, tokens). Raises Diverged.
    """
    train, trained = run.options.train, [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim > 1]  # peft's vectors are matrices of one row
    others = [p for p in trained if p.squeeze().ndim <= 1]
    groups = [dict(params=matrices, weight_decay=train.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=(0.9, 0.95), fused=True)
    n_steps, interval = train.max_steps, train.eval_interval
    best, kept, seconds, n_tokens = math.inf, None, 0.0, 0
    start = time.perf_counter()
    for number, batch in zip(range(1, n_steps + 1), loop.batches(run.train_examples, train)):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(number, n_steps, n_steps // 10, train)
        loss_of(network, batch, sum(e.n_targets for e in batch), run).backward()
        torch.nn.utils.clip_grad_norm_(trained, train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        n_tokens += sum(len(e.ids) for e in batch)
        late = train.max_time is not None and seconds + time.perf_counter() - start >= 60 * train.max_time
        if number % interval == 0 or number == n_steps or late:
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            network.eval()
            with torch.no_grad():
                parts = (run.val_examples[i : i + 16] for i in range(0, len(run.val_examples), 16))
                targets = sum(e.n_targets for e in run.val_examples)
                val_loss = sum(loss_of(network, part, targets, run).item() for part in parts)
            network.train()
            if not math.isfinite(val_loss):
                raise loop.Diverged(f"validation loss {val_loss} at step {number}: try a lower learning rate")
            if val_loss < best:
                best, kept = val_loss, [p.detach().clone() for p in trained]
            if late:
                break
            start = time.perf_counter()
    with torch.no_grad():
        for p, value in zip(trained, kept, strict=True):
            p.copy_(value)
    return best, seconds, n_tokens


def loss_of(network: torch.nn.Module, batch: list[Example], n_targets: int, run: setup.Run) -> Tensor:
    """Cross-entropy summed over the targets of the batch, divided by n_targets."""
    (tensors,) = padded(batch, len(batch), run.device)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
        return network(**tensors, num_items_in_batch=n_targets).loss


@torch.no_grad()
def judge(
    network: torch.nn.Module, rows: Sequence[Example], task: classify.Task, labels: list[list[int]], run: setup.Run
) -> classify.Verdict:
    """As classify.judge: the label with the highest log-probability after the prompt wins."""
    network.eval()
    scores = torch.empty(len(labels), len(rows))
    for k, label in enumerate(labels):
        asked = [Example(np.append(e.ids[: e.first_target], label), e.first_target) for e in rows]
        for i in range(0, len(asked), 16):
            (tensors,) = padded(asked[i : i + 16], 16, run.device)
            targets = tensors.pop("labels")[:, 1:]
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
                logits = network(**tensors).logits[:, -targets.shape[1] - 1 : -1]  # without those of virtual tokens
            cost = torch.nn.functional.cross_entropy(logits.mT.float(), targets, reduction="none")
            scores[k, i : i + 16] = -cost.sum(1).cpu()
    truth = [task.classes[i] for i in classify.numbers(rows, labels)]
    return classify.verdict(truth, [task.classes[i] for i in scores.argmax(0).tolist()], task.classes)
