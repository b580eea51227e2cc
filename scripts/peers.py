"""The network of transformers + peft that bench.py measures beside ours, and batches as it wants them: padded."""

from collections.abc import Iterator

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_model import model
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
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie,
        use_cache=False,
    )
    dtype = torch.float32 if precision == "fp32" or method == "full" else torch.bfloat16
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="sdpa")
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
    if method == "full":
        return network.train()
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
