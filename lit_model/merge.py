"""Merges what a finetuning run has trained into the base weights: a Hugging Face folder that needs no method folder."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_model.families import write_config
from lit_model.files import cast, refuse_used
from lit_model.load import (
    empty_network,
    install_method,
    is_base,
    load,
    load_base,
    load_tokenizer,
    method_header,
    method_options,
    save_method,
)
from lit_model.model import GPT, Linear
from lit_model.weights.folder import Folder, network_shapes, save_folder, tokenizer_files


def merge(
    checkpoint_dir: Path, method_dir: Path, out_dir: Path, dtype: torch.dtype | None = None, overwrite: bool = False
) -> None:
    """Writes `out_dir`. What does not merge, and what the fields of transformers cannot say (a bias of the output
    layer), stays in a method folder inside it. Prints how much of what was trained the storage loses.

    Args:
        dtype: dtype of the stored weights; None: that of the base.
    Raises:
        ValueError: the method cannot be merged, or `out_dir` is in use.
    """
    if not overwrite:
        refuse_used(out_dir)
    base, header = Folder(checkpoint_dir), method_header(method_dir)
    gpt = load(checkpoint_dir, method_dir)
    gpt.merge()
    rest = {name: t for name, t in gpt.state_dict().items() if not is_base(name)}
    name = header["method"]
    if name != "adapter_v2" and not all(key.startswith("heads.") for key in rest):
        raise ValueError(f"{name} cannot be merged into the base weights; generate with --method_dir instead")
    biases = take_biases(gpt, base)
    exact = {key: t for key, t in gpt.state_dict().items() if is_base(key)}
    before = {key: _base_tensor(base, key, len(t)) for key, t in exact.items()}
    stored = {key: cast(key, t, dtype or before[key].dtype) for key, t in exact.items()}
    has_tokens = bool(header["tokens"])
    files = load_tokenizer(checkpoint_dir, method_dir).files() if has_tokens else tokenizer_files(base.path)
    save_folder(out_dir, gpt.config, stored, files, base.hf)
    lost = rounding_error(exact, stored, before)
    hint = "; --dtype float32 keeps it" if lost > 0.05 else ""
    print(f"storing the sum loses {100 * lost:.3g} % of what was trained{hint}")
    if (kind := header["quantize"]) != "none":
        print(f"it was trained over {kind}, and is merged into the full weights: look at what it answers now")
    print(f"checkpoint: {out_dir}; give generate/base.py the --style that it was trained with")
    if rest or biases:
        if not biases:
            name = {"adapter_v2": "adapter"}.get(name, "full")
        _save_rest(out_dir, name, header, rest, biases)
        print(f"the rest of it does not merge: give generate/base.py --method_dir {out_dir / name}, too")


def _base_tensor(base: Folder, name: str, n_out: int) -> Tensor:
    """The base's tensor; zeros for a bias that it does not have."""
    is_new = name.endswith(".bias") and name not in base.names
    return base.tensor("wte.weight").new_zeros(n_out) if is_new else base.tensor(name)


def take_biases(gpt: GPT, base: Folder) -> dict[str, Tensor]:
    """Takes out the biases that merging has made and no config.json can say: linear layer -> bias."""
    for name in ("head_bias", "bias", "qkv_bias"):
        if write_config(gpt.config, base.hf) is None:
            gpt.config = replace(gpt.config, **{name: getattr(base.config, name)})
    biases, shapes = {}, network_shapes(gpt.config)
    for name, linear in gpt.named_modules():
        if isinstance(linear, Linear) and linear.bias is not None and is_base(name) and f"{name}.bias" not in shapes:
            biases[name], linear.bias = linear.bias.detach(), None
    return biases


def _save_rest(
    out_dir: Path, name: str, header: Mapping[str, Any], rest: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> None:
    """Writes a method folder over the merged base: the method as it starts, but for `rest` and `biases`."""
    merged, options = Folder(out_dir), method_options(name, **header["options"])
    gpt = empty_network(merged)
    install_method(gpt, name, options, header["task"])
    load_base(gpt.requires_grad_(False), merged, None)
    gpt.load_state_dict(rest, strict=False)
    for key, bias in biases.items():
        (delta,) = gpt.get_submodule(key).deltas.values()
        delta.bias.data = bias
    for key, p in gpt.named_parameters():
        p.requires_grad_(not is_base(key))  # what is saved
    (out_dir / name).mkdir(exist_ok=True)
    save_method(out_dir / name / "lit_method.safetensors", gpt, name, options, merged.identity, header["task"])


def rounding_error(exact: Mapping[str, Tensor], stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """|stored - exact| / |exact - base| over all tensors that training has changed, without rows of new tokens."""
    error = change = 0.0
    for name, t in exact.items():
        n = len(base[name])
        if (moved := (t[:n] - base[name].float()).square().sum().item()) > 0:
            change += moved
            error += (stored[name].float() - t)[:n].square().sum().item()
    return math.sqrt(error / change) if change else 0.0
