"""Weights in: a folder as Meta publishes LLaMA becomes a checkpoint folder.

    consolidated.00.pth, consolidated.01.pth, ...    the network in slices, one for each GPU that it was meant for
    params.json, tokenizer.model

q and k are in Meta's rope order, where neighbours turn together. Of matrices whose inputs are sliced (wo, w2, and the
embeddings before LLaMA 3) the slices stand side by side, of the others one below the other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_model.checkpoint import save_checkpoint
from lit_model.convert import renamed, tokenizer_files, unpickled
from lit_model.convert_gguf import half_split
from lit_model.files import as_dtype, blamed_on, read_json, refuse_used
from lit_model.model import Config

_META_NAMES = {
    "tok_embeddings": "wte",
    "norm": "norm_f",
    "output": "lm_head",
    "attention_norm": "norm_1",
    "ffn_norm": "norm_2",
    **{f"attention.w{p}": f"attn.{p}_proj" for p in "qkvo"},
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def convert_meta(src_dir: Path, out_dir: Path, dtype: torch.dtype | None = None, block_size: int | None = None) -> None:
    """Converts a folder with params.json and consolidated.*.pth.

    Args:
        dtype: of the stored weights; None keeps what the source has.
        block_size: longest context, which the files do not state; None: that of LLaMA 1, 3 or 3.1, as they look.
    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is broken, or no such network.
    """
    refuse_used(out_dir)
    params = read_json(src_dir / "params.json", "dim", "n_layers", "n_heads", "norm_eps")
    paths = sorted(src_dir.glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{src_dir} has no consolidated.*.pth")
    if (numbers := [path.name for path in paths]) != [f"consolidated.{i:02}.pth" for i in range(len(paths))]:
        raise FileNotFoundError(f"{src_dir} has {', '.join(numbers)}: a slice between them is missing")
    slices = [unpickled(path) for path in paths]
    names = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    if missing := [name for name in names if name not in slices[0]]:
        raise ValueError(f"{paths[0]} has no tensor {missing[0]}")
    with blamed_on(src_dir / "params.json"):
        config = _config(params, slices, block_size)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in slices[0]:
            if name != "rope.freqs":
                if lacking := [path for path, part in zip(paths, slices, strict=True) if name not in part]:
                    raise ValueError(f"{lacking[0]} has no tensor {name}")
                t = _joined(name, [part[name] for part in slices], config)
                yield renamed(name, _META_NAMES), as_dtype(name, t, dtype)

    files = tokenizer_files(src_dir)
    if "tokenizer.model" in files and "tokenizer.json" not in files and _is_tiktoken(files["tokenizer.model"]):
        raise ValueError(
            f"{src_dir / 'tokenizer.model'} is of tiktoken's kind: put tokenizer.json and tokenizer_config.json of "
            "the same network on the Hub beside it"
        )
    with blamed_on(src_dir):
        save_checkpoint(out_dir, config, tensors(), files)


def _config(params: dict[str, Any], slices: list[dict[str, Tensor]], block_size: int | None) -> Config:
    embedding, w1 = (slices[0][name] for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"))
    vocab_size, n_embd, n_hidden = params.get("vocab_size", -1), params["dim"], len(w1) * len(slices)
    if vocab_size < 0:  # not stated before LLaMA 3
        vocab_size = len(embedding)
    long = params.get("use_scaled_rope", False)
    if block_size is None:
        block_size = 131072 if long else 8192 if vocab_size > 100_000 else 2048
    return Config(
        vocab_size=vocab_size,
        block_size=block_size,
        n_layer=params["n_layers"],
        n_head=params["n_heads"],
        n_kv_head=params.get("n_kv_heads"),
        n_embd=n_embd,
        n_hidden=n_hidden,
        rope_base=params.get("rope_theta", 10000.0),
        rope_scaling=dict(
            factor=32.0 if n_embd < 4096 else 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192
        ) if long else None,
        window=params.get("sliding_window"),  # Mistral's
        norm_eps=params["norm_eps"],
        tie="output.weight" not in slices[0],
    )  # fmt: skip


def _joined(name: str, parts: list[Tensor], config: Config) -> Tensor:
    if parts[0].ndim == 1:
        return parts[0]
    side_by_side = name.endswith(("wo.weight", "w2.weight")) or (
        name.startswith("tok_embeddings") and len(parts[0]) == config.vocab_size
    )
    whole = torch.cat(parts, dim=1 if side_by_side else 0) if len(parts) > 1 else parts[0]
    return half_split(whole, config.head_size) if name.endswith(("wq.weight", "wk.weight")) else whole


def _is_tiktoken(content: bytes) -> bool:
    """Lines of base64 and a rank, where sentencepiece has a message of protobuf."""
    first = content.split(b"\n", 1)[0].split(b" ")
    return len(first) == 2 and first[1].isdigit()
