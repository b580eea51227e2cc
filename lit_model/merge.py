"""Merges what a finetuning run has trained into the base weights: a Hugging Face folder that needs no method folder."""

import json
import math
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
from lit_model.weights.folder import Folder, save_folder, tokenizer_files


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
    name, task = header["method"], task_in(header)
    only_head = all(key.startswith("heads.") for key in rest)
    if rest and not only_head and name != "adapter_v2":
        raise ValueError(f"{name} cannot be merged into the base weights; generate with --method_dir instead")
    biases = _take_biases(gpt, base)
    exact = {key: t for key, t in gpt.state_dict().items() if is_base(key)}
    before = {key: _base_tensor(base, key) for key in exact}
    stored = {key: t.to(dtype or before[key].dtype) for key, t in exact.items()}
    save_folder(out_dir, gpt.config, stored, tokenizer_files(base.path), base.hf)
    lost = rounding_error(exact, stored, before)
    print(
        f"storing the sum loses {100 * lost:.3g} % of what was trained" + ("; --dtype float32 keeps it" * (lost > 0.05))
    )
    if (kind := header.get("quantize", "none")) != "none":
        print(f"it was trained over {kind}, and is merged into the full weights: look at what it answers now")
    print(f"checkpoint: {out_dir}; give generate/base.py the --style that it was trained with")
    if rest or biases:
        left = out_dir / ("full" if only_head and not biases else name)
        left.mkdir(exist_ok=True)
        options = json.loads(header["options"])
        if left.name == "full":
            method_name, tensors = "full", rest
        else:
            method_name, tensors = name, _as_method(Folder(out_dir), name, options, rest, biases)
        file = left / "lit_method.safetensors"
        save_tensors(file, tensors, method_name, method_options(method_name, **options), Folder(out_dir).identity, task)
        print(f"the rest of it does not merge: give generate/base.py --method_dir {left}, too")


def _base_tensor(base: Folder, name: str) -> Tensor:
    """The base's tensor; zeros, (1,), for a bias that it does not have."""
    name = "wte.weight" if name == "lm_head.weight" and base.config.tie else name
    return base.tensor(name) if name in base.names else base.tensor("wte.weight").new_zeros(1)


def _take_biases(gpt: GPT, base: Folder) -> dict[str, Tensor]:
    """Takes out the biases that merging has made and no config.json of its family can say: linear layer -> bias."""
    shapes = [gpt.config]
    for name in ("head_bias", "bias", "qkv_bias"):
        shapes.append(replace(shapes[-1], **{name: getattr(base.config, name)}))
    gpt.config = next((shape for shape in shapes if write_config(shape, base.hf)), shapes[-1])
    with torch.device("meta"):
        names = GPT(gpt.config).state_dict().keys()
    biases = {}
    for name, linear in [(name, m) for name, m in gpt.named_modules() if isinstance(m, Linear)]:
        if linear.bias is not None and f"{name}.bias" not in names:
            biases[name], linear.bias = linear.bias.detach(), None
    return biases


def _as_method(
    merged: Folder, name: str, options: dict, rest: dict[str, Tensor], biases: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of the method over the merged base: as it starts, but for `rest` and `biases`."""
    gpt = empty_network(merged)
    with torch.device("meta"):
        method_module(name).install(gpt, method_options(name, **options))
    initialize(gpt, "cpu")
    tensors = {key: t for key, t in gpt.state_dict().items() if not is_base(key)} | rest
    for layer, bias in biases.items():
        (delta,) = (d for d in gpt.get_submodule(layer).deltas if hasattr(gpt.get_submodule(layer).deltas[d], "bias"))
        tensors[f"{layer}.deltas.{delta}.bias"] = bias
    return tensors


def rounding_error(exact: dict[str, Tensor], stored: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """|stored - exact| / |exact - base| over all tensors that training has changed."""
    error = change = 0.0
    for name, t in exact.items():
        if (moved := (t - base[name].float()).square().sum().item()) > 0:
            change += moved
            error += (stored[name].float() - t).square().sum().item()
    return math.sqrt(error / change) if change else 0.0
