"""Merges what a finetuning run has trained into the base weights: a Hugging Face folder that needs no method folder."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_model.data.examples import ALPACA
from lit_model.families import write_config
from lit_model.files import cast, refuse_used
from lit_model.load import (
    MethodDirs,
    empty_network,
    install_method,
    install_saved,
    is_base,
    load,
    load_base,
    load_tokenizer,
    method_dirs,
    method_header,
    method_options,
    save_method,
)
from lit_model.model import GPT, Linear
from lit_model.weights.folder import Folder, network_shapes, save_folder, tokenizer_files

QUESTIONS = (
    "Give three tips for staying healthy.", "Why is the sky blue?", "Write a haiku about the sea.",
    "Which of 17 and 71 is larger?",
)  # fmt: skip


class Merged:
    """A base, and what method folders have trained for it, merged as far as that goes.

    Raises ValueError if a method cannot be merged.
    """

    def __init__(self, checkpoint_dir: Path, method_dir: MethodDirs | None = None, as_a_whole: bool = False):
        self.base, self.headers = Folder(checkpoint_dir), [method_header(folder) for folder in method_dirs(method_dir)]
        self.gpt = empty_network(self.base)
        install_saved(self.gpt, method_dir, self.base)
        self.gpt.tie()
        shape = deepcopy(self.gpt).to("meta")
        shape.tie()
        shape.merge()
        self.rest = {name: self.gpt.state_dict()[name] for name in shape.state_dict() if not is_base(name)}
        """tensors that do not merge: prompts and gates of adapter_v2, a classification layer"""
        self.method = ",".join(header["method"] for header in self.headers)
        self.biases: dict[str, Tensor | None] = dict.fromkeys(take_biases(shape, self.base))
        """those that merging makes and no config.json can say; `tensors` fills them in"""
        may_leave = self.method == "adapter_v2" or all(name.startswith("heads.") for name in self.rest)
        self.is_whole = not (self.rest or self.biases)
        if not self.is_whole and (as_a_whole or len(self.headers) > 1 or not may_leave):
            where = f"cannot be merged{' as a whole' * as_a_whole} into the base weights"
            raise ValueError(f"{self.method} {where}; generate with --method_dir instead")
        self.config = shape.config
        self.tokenizer = load_tokenizer(checkpoint_dir, method_dir)

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, merged tensor in float32, the base's), one at a time; the same one twice where nothing is merged. A
        bias that the base does not have is zero there."""
        stored = {*self.base.names, "lm_head.weight"}
        for path, m in self.gpt.named_modules():
            own = {name: p for name, p in m.named_parameters(recurse=False) if is_base(f"{path}.{name}")}
            if not own:
                continue
            before = {name: self.base.tensor(f"{path}.{name}") for name in own if f"{path}.{name}" in stored}
            after = {name: before[name] if p.is_meta else p.float() for name, p in own.items()}
            for delta in getattr(m, "deltas", {}).values():
                if hasattr(delta, "merged"):
                    pair = (None if t is None else t.float() for t in (after["weight"], after.get("bias")))
                    after = dict(zip(("weight", "bias"), delta.merged(*pair), strict=True))
            for name, t in after.items():
                if name == "bias" and path in self.biases:
                    self.biases[path] = t
                elif t is not None:
                    base = before.get(name, before["weight"].new_zeros(len(t)))
                    yield f"{path}.{name}", t if t is base else t.detach(), base


def merge(
    checkpoint_dir: Path,
    method_dir: MethodDirs,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
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
    merged, loss = Merged(checkpoint_dir, method_dir), Loss()
    base, has_tokens = merged.base, any(header["tokens"] for header in merged.headers)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, exact, before in merged.tensors():
            stored = cast(name, exact, dtype or before.dtype)
            loss.add(exact, stored, before)
            yield name, stored

    files = merged.tokenizer.files() if has_tokens else tokenizer_files(base.path)
    save_folder(out_dir, merged.config, tensors(), files, base.hf)
    print(f"storing the sum {loss}{'; --dtype float32 keeps it' if loss.share > 0.05 else ''}")
    for kind in {header["quantize"] for header in merged.headers} - {"none"}:
        print(f"it was trained over {kind}, and is merged into the full weights: look at what it answers now")
    if not merged.is_whole:
        name = merged.method if merged.biases else {"adapter_v2": "adapter"}.get(merged.method, "full")
        _save_rest(out_dir, name, merged)
        print(f"the rest of it does not merge: give generate/base.py --method_dir {out_dir / name}, too")


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


def _save_rest(out_dir: Path, name: str, merged: Merged) -> None:
    """Writes a method folder over the merged base: the method as it starts, but for what is left of it."""
    base, header = Folder(out_dir), merged.headers[-1]
    gpt, options = empty_network(base), method_options(name, **header["options"])
    install_method(gpt, name, options, header["task"])
    load_base(gpt.requires_grad_(False), base, None)
    gpt.load_state_dict(merged.rest, strict=False)
    for key, bias in merged.biases.items():
        (delta,) = gpt.get_submodule(key).deltas.values()
        delta.bias.data = bias
    for key, p in gpt.named_parameters():
        p.requires_grad_(not is_base(key))  # what is saved
    (out_dir / name).mkdir(exist_ok=True)
    save_method(out_dir / name / "lit_method.safetensors", gpt, name, options, base.identity, header["task"])


@torch.no_grad()
def compare(checkpoint_dir: Path, method_dir: MethodDirs, out_dir: Path) -> str:
    """A line about how `out_dir`, which `merge` has written, answers beside the unmerged network. Weights stay in the
    mapped files."""
    tokenizer, logits = load_tokenizer(checkpoint_dir, method_dir), []
    texts = [tokenizer.encode(ALPACA.replace("{instruction}", question)) for question in QUESTIONS]
    idx = torch.tensor([tokenizer.bos + ids[: min(map(len, texts))] for ids in texts])
    rest = [file.parent for file in out_dir.glob("*/lit_method.safetensors")]  # what did not merge
    for folder, methods in ((checkpoint_dir, method_dir), (out_dir, rest)):
        gpt = load(folder, methods, dtype=None)
        gpt.dtype = torch.float32
        gpt.heads.clear()
        logits.append(gpt(idx))
    before, after = logits
    differs = (after - before).abs().max() / before.abs().max()
    same = 100 * (after.argmax(-1) == before.argmax(-1)).float().mean()
    how = f"logits differ by at most {differs:.2g} of the largest, and the likeliest token is the same for {same:.1f} %"
    return f"merged beside unmerged, on {idx.numel()} tokens: {how}"


class Loss:
    """|stored - exact| / |exact - base| over all tensors that training has changed, without rows of new tokens."""

    def __init__(self):
        self.error = self.change = 0.0

    def add(self, exact: Tensor, stored: Tensor, base: Tensor) -> None:
        n = len(base)
        if exact is not base and (moved := (exact[:n] - base.float()).square().sum().item()) > 0:
            self.change += moved
            self.error += (stored.float() - exact)[:n].square().sum().item()

    @property
    def share(self) -> float:
        return math.sqrt(self.error / self.change) if self.change else 0.0

    def __str__(self) -> str:
        if self.share < 1:
            return f"loses {100 * self.share:.3g} % of what was trained"
        return f"changes the weights {self.share:.2g} times as much as training has"
