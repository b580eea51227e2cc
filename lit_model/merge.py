"""Merges what a finetuning run has trained into the base weights: a Hugging Face folder that needs no method folder."""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
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
    install_saved,
    is_base,
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
) -> bool:
    """Writes `out_dir`. Returns whether it is the whole network: what does not merge, and what the fields of
    transformers cannot say (a bias of the output layer), stays in a method folder inside it. Prints how much of what
    was trained the storage loses.

    Args:
        dtype: dtype of the stored weights; None: that of the base.
    Raises:
        ValueError: the method cannot be merged, or `out_dir` is in use.
    """
    if not overwrite:
        refuse_used(out_dir)
    base, header = Folder(checkpoint_dir), method_header(method_dir)
    gpt = empty_network(base)
    install_saved(gpt, method_dir, base)
    gpt.tie()
    merged = deepcopy(gpt).to("meta")  # its shape
    merged.tie()
    merged.merge()
    rest = {name: gpt.state_dict()[name] for name in merged.state_dict() if not is_base(name)}
    name = header["method"]
    if name != "adapter_v2" and not all(key.startswith("heads.") for key in rest):
        raise ValueError(f"{name} cannot be merged into the base weights; generate with --method_dir instead")
    biases = dict.fromkeys(take_biases(merged, base))
    loss = Loss()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, exact, before in merged_tensors(gpt, base):
            if key.removesuffix(".bias") in biases:
                biases[key.removesuffix(".bias")] = exact
                continue
            stored = cast(key, exact, dtype or before.dtype)
            loss.add(exact, stored, before)
            yield key, stored

    has_tokens = bool(header["tokens"])
    files = load_tokenizer(checkpoint_dir, method_dir).files() if has_tokens else tokenizer_files(base.path)
    save_folder(out_dir, merged.config, tensors(), files, base.hf)
    hint = "; --dtype float32 keeps it" if loss.share > 0.05 else ""
    print(f"storing the sum loses {100 * loss.share:.3g} % of what was trained{hint}")
    if (kind := header["quantize"]) != "none":
        print(f"it was trained over {kind}, and is merged into the full weights: look at what it answers now")
    if rest or biases:
        if not biases:
            name = {"adapter_v2": "adapter"}.get(name, "full")
        _save_rest(out_dir, name, header, rest, biases)
        print(f"the rest of it does not merge: give generate/base.py --method_dir {out_dir / name}, too")
    return not (rest or biases)


def merged_tensors(gpt: GPT, base: Folder) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, merged tensor in float32, the base's) of all of a network on the meta device that has a method's tensors:
    one at a time is in memory. A bias that the base does not have is zero there."""
    stored = {*base.names, "lm_head.weight"}
    for path, m in gpt.named_modules():
        own = {name: p for name, p in m.named_parameters(recurse=False) if is_base(f"{path}.{name}")}
        if not own:
            continue
        before = {name: base.tensor(f"{path}.{name}") for name in own if f"{path}.{name}" in stored}
        after = {name: before[name] if p.is_meta else p for name, p in own.items()}
        after = {name: t.float() for name, t in after.items()}
        for delta in getattr(m, "deltas", {}).values():
            if hasattr(delta, "merged"):
                pair = delta.merged(after["weight"], after.get("bias"))
                after = {name: t for name, t in zip(("weight", "bias"), pair, strict=True) if t is not None}
        for name, t in after.items():
            yield f"{path}.{name}", t.detach(), before.get(name, before["weight"].new_zeros(len(t)))


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


class Loss:
    """|stored - exact| / |exact - base| over all tensors that training has changed, without rows of new tokens."""

    def __init__(self):
        self.error = self.change = 0.0

    def add(self, exact: Tensor, stored: Tensor, base: Tensor) -> None:
        n = len(base)
        if (moved := (exact[:n] - base.float()).square().sum().item()) > 0:
            self.change += moved
            self.error += (stored.float() - exact)[:n].square().sum().item()

    @property
    def share(self) -> float:
        return math.sqrt(self.error / self.change) if self.change else 0.0
