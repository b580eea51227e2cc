"""Merges what a finetuning run has trained into the base weights: a Hugging Face folder that needs no method folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_model.families import write_config
from lit_model.files import refuse_used
from lit_model.load import (
    empty_network,
    initialize,
    is_base,
    load,
    method_header,
    method_module,
    method_options,
    save_tensors,
    task_in,
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
    before = {key: _base_tensor(base, key) for key in exact}
    stored = {key: t.to(dtype or before[key].dtype) for key, t in exact.items()}
    save_folder(out_dir, gpt.config, stored, tokenizer_files(base.path), base.hf)
    lost = rounding_error(exact, stored, before)
    hint = "; --dtype float32 keeps it" if lost > 0.05 else ""
    print(f"storing the sum loses {100 * lost:.3g} % of what was trained{hint}")
    if (kind := header.get("quantize", "none")) != "none":
        print(f"it was trained over {kind}, and is merged into the full weights: look at what it answers now")
    print(f"checkpoint: {out_dir}; give generate/base.py the --style that it was trained with")
    if rest or biases:
        merged = Folder(out_dir)
        if not biases:
            name = {"adapter_v2": "adapter"}.get(name, "full")
        options = method_options(name, **json.loads(header["options"])) if name != "full" else None
        left = out_dir / name
        left.mkdir(exist_ok=True)
        tensors = _unmerged(merged, name, options, rest, biases)
        save_tensors(left / "lit_method.safetensors", tensors, name, options, merged.identity, task_in(header))
        print(f"the rest of it does not merge: give generate/base.py --method_dir {left}, too")


def _base_tensor(base: Folder, name: str) -> Tensor:
    """The base's tensor; one zero for a bias that it does not have."""
    name = "wte.weight" if name == "lm_head.weight" and base.config.tie else name
    return base.tensor(name) if name in base.names else base.tensor("wte.weight").new_zeros(1)


def take_biases(gpt: GPT, base: Folder) -> dict[str, Tensor]:
    """Takes out the biases that merging has made and no config.json can say: linear layer -> bias."""
    shapes = [gpt.config]
    for name in ("head_bias", "bias", "qkv_bias"):
        shapes.append(replace(shapes[-1], **{name: getattr(base.config, name)}))
    gpt.config = next(shape for shape in shapes if write_config(shape, base.hf))
    biases, shapes = {}, network_shapes(gpt.config)
    for name, linear in gpt.named_modules():
        if isinstance(linear, Linear) and linear.bias is not None and is_base(name) and f"{name}.bias" not in shapes:
            biases[name], linear.bias = linear.bias.detach(), None
    return biases


def _unmerged(
    merged: Folder, name: str, options: object, rest: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the method over the merged base: as it starts, but for `rest` and `biases`."""
    gpt = empty_network(merged)
    with torch.device("meta"):
        method_module(name).install(gpt, options)
    initialize(gpt, "cpu")
    tensors = {key: t for key, t in gpt.state_dict().items() if not is_base(key)} | dict(rest)
    for key, bias in biases.items():
        (delta,) = gpt.get_submodule(key).deltas
        tensors[f"{key}.deltas.{delta}.bias"] = bias
    return tensors


def rounding_error(exact: Mapping[str, Tensor], stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """|stored - exact| / |exact - base| over all tensors that training has changed."""
    error = change = 0.0
    for name, t in exact.items():
        if (moved := (t - base[name].float()).square().sum().item()) > 0:
            change += moved
            error += (stored[name].float() - t).square().sum().item()
    return math.sqrt(error / change) if change else 0.0
