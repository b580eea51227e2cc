"""Weights in: a folder as Meta publishes LLaMA becomes a Hugging Face folder.

    consolidated.00.pth, consolidated.01.pth, ...    the network in slices, one for each GPU that it was meant for
    params.json, tokenizer.model

q and k are in Meta's rope order, where neighbours turn together. Slices of matrices whose inputs are sliced (wo, w2,
and the embeddings before LLaMA 3) stand side by side, of the others one below the other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_model.config import Config
from lit_model.families import read_config
from lit_model.files import cast, read_json, reading, refuse_used
from lit_model.weights.folder import save_folder, tokenizer_files, unpickled
from lit_model.weights.gguf import files_of, half_split, our_name
from lit_model.weights.sentencepiece import read_model

NAMES = {  # Meta's modules -> ours
    "tok_embeddings": "wte", "norm": "norm_f", "output": "lm_head", "attention_norm": "norm_1", "ffn_norm": "norm_2",
    **{f"attention.w{p}": f"attn.{p}_proj" for p in "qkvo"},
    **{f"feed_forward.w{i}": f"mlp.{p}_proj" for i, p in enumerate(("gate", "down", "up"), 1)},
}  # fmt: skip


def convert_meta(src_dir: Path, out_dir: Path, dtype: torch.dtype | None = None, block_size: int | None = None) -> None:
    """Converts a folder with params.json and consolidated.*.pth.

    Args:
        dtype: dtype of the stored weights; None keeps that of the source.
        block_size: longest context, which the files do not state; None: that of LLaMA 1, 3 or 3.1, as they look.
    Raises:
        FileNotFoundError: there is no params.json. ValueError: a file is broken or missing, or no such network.
    """
    refuse_used(out_dir)
    params = read_json(src_dir / "params.json")
    slices = [unpickled(path) for path in sorted(src_dir.glob("consolidated.*.pth"))]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(slices[0].keys() - {"rope.freqs"}):
            t = _joined(name, [part[name] for part in slices], config)
            yield our_name(name, NAMES), cast(name, t, dtype) if dtype and t.is_floating_point() else t

    with reading(src_dir):
        hf = _config(params, slices, block_size)
        _, config = read_config(hf)
        save_folder(out_dir, config, tensors(), _tokenizer_files(src_dir), hf)


def _config(params: dict[str, Any], slices: list[dict[str, Tensor]], block_size: int | None) -> dict[str, Any]:
    """config.json."""
    is_long, window = params.get("use_scaled_rope", False), params.get("sliding_window")  # Mistral's
    vocab_size, n_embd = params.get("vocab_size", -1), params["dim"]
    if vocab_size < 0:  # not stated before LLaMA 3
        vocab_size = len(slices[0]["tok_embeddings.weight"])
    if block_size is None:
        block_size = 131072 if is_long else 8192 if vocab_size > 100_000 else 2048
    scaling = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    hf = dict(
        model_type="mistral" if window else "llama",
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        num_hidden_layers=min(params["n_layers"], len(slices[0])),  # a billion would take long to miss
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads"),
        hidden_size=n_embd,
        intermediate_size=len(slices[0]["layers.0.feed_forward.w1.weight"]) * len(slices),
        rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=scaling | dict(factor=32.0 if n_embd < 4096 else 8.0) if is_long else None,
        rms_norm_eps=params["norm_eps"],
        tie_word_embeddings="output.weight" not in slices[0],
    )
    return hf | dict(sliding_window=window) if window else hf


def _joined(name: str, parts: list[Tensor], config: Config) -> Tensor:
    inputs_sliced = name.endswith(("wo.weight", "w2.weight"))
    inputs_sliced |= name == "tok_embeddings.weight" and len(parts[0]) == config.vocab_size
    whole = torch.cat(parts, dim=int(inputs_sliced)) if len(parts) > 1 and parts[0].ndim > 1 else parts[0]
    return half_split(whole, config.head_size) if name.endswith(("wq.weight", "wk.weight")) else whole


def _tokenizer_files(src_dir: Path) -> dict[str, bytes]:
    """tokenizer.json and its kin as they stand there, or made from tokenizer.model of sentencepiece."""
    files = tokenizer_files(src_dir)
    if "tokenizer.json" in files or "tokenizer.model" not in files:
        return files
    with reading(src_dir / "tokenizer.model"):
        tokenizer, bos, eos = read_model(src_dir / "tokenizer.model")
        return files_of(tokenizer, bos, [eos], adds_bos=True)
