"""load(): a network from a checkpoint folder, plus the tensors that finetuning runs trained for it. The only file that
knows all methods.

checkpoint folder   a Hugging Face folder (weights/folder.py)
method folder       lit_method.safetensors   trained tensors; its header names the method, its options and the identity
                                             of the base that they were trained on: generation needs no option typed
                                             again

A method only adds keys to a state dict and never renames the base's. So every checkpoint loads into every method, and
the keys that are missing afterwards are exactly the method's own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_model.files import reading, refuse_pointer, write_tensors
from lit_model.model import GPT, Linear
from lit_model.weights.folder import Folder

if TYPE_CHECKING:
    from lit_model.data.labels import Task
    from lit_model.methods.side_by_side import SideBySide

METHODS = {  # a file in methods/ -> the dataclass of its options
    "adapter": "Adapter",
    "adapter_v2": "AdapterV2",
    "bottleneck": "Bottleneck",
    "dora": "DoRA",
    "full": None,
    "ia3": "IA3",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "prefix": "Prefix",
    "prompt": "Prompt",
    "selective": "Selective",
}


def method_module(name: str) -> ModuleType:
    return import_module(f"lit_model.methods.{name}")


def method_options(name: str, **options: Any) -> Any:
    """The options of a method, `options` instead of its defaults; None for full, which has none."""
    return getattr(method_module(name), METHODS[name])(**options) if METHODS[name] else None


def load(
    folder: Path | str,
    method_dir: Path | str | Sequence[Path | str] | Mapping[str, Path | str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str = "none",
) -> "GPT | SideBySide":
    """The network in `folder`, with what `method_dir` has trained on it, in eval mode.

    Args:
        folder: any Hugging Face folder of a supported family.
        method_dir: the out_dir of a finetuning run, or one .safetensors file in it; a list composes, in its order; a
            dict puts methods side by side, see methods/side_by_side.py.
        dtype: dtype of the base weights and of all activations.
        quantize: form of the base weights: none, nf4, int8 or fp8, see quantize.py.
    Raises:
        FileNotFoundError: a file is not there. ValueError: it is broken, or the method was trained on another base.
    """
    base = Folder(folder)
    if isinstance(method_dir, Mapping):
        return _side_by_side(base, method_dir, device, dtype, quantize)
    folders = [method_dir] if isinstance(method_dir, (Path, str)) else method_dir or []
    gpt = empty_network(base)
    tensors: dict[str, Tensor] = {}
    for one in folders:
        added = install_saved(gpt, one, base)
        trained = read_method(one, gpt, added)
        if twice := sorted(trained.keys() & tensors.keys()):
            raise ValueError(f"{one} and a folder before it both hold {twice[0]}: they do not compose")
        tensors |= trained
    _check_order(gpt)
    load_base(gpt, base, dtype, device, quantize, tensors)
    return gpt.requires_grad_(False).eval()


def empty_network(base: Folder) -> GPT:
    """The network of a folder on the meta device, frozen, ready for a method."""
    with torch.device("meta"):
        return GPT(base.config).requires_grad_(False)


def install_saved(gpt: GPT, method_dir: Path | str, base: Folder) -> set[str]:
    """Adds the method of a folder to a network on the meta device. Returns the names of the tensors that it adds."""
    header = method_header(method_dir)
    if header["base"] != base.identity:
        raise ValueError(f"{method_dir} was trained on another base than {base.path}")
    before = gpt.state_dict().keys()
    with reading(method_file(method_dir)), torch.device("meta"):
        name = header["method"]
        method_module(name).install(gpt, method_options(name, **json.loads(header["options"])))
        if (task := task_in(header)) and task.head == "linear":
            from lit_model.data import labels

            labels.install(gpt, len(task.classes))
    return gpt.state_dict().keys() - before


def _check_order(gpt: GPT) -> None:
    """Raises ValueError where one method would undo another."""
    for name, linear in gpt.named_modules():
        for method, delta in list(linear.deltas.items())[1:] if isinstance(linear, Linear) else ():
            if getattr(delta, "first", False):
                before = next(iter(linear.deltas))
                raise ValueError(f"on {name} {method} has to act before {before}: name its folder first")


def _side_by_side(
    base: Folder, folders: Mapping[str, Path | str], device: Any, dtype: torch.dtype, quantize: str
) -> "SideBySide":
    from lit_model.methods.side_by_side import SideBySide

    with torch.device("meta"):
        gpt = SideBySide(base.config).requires_grad_(False)
    load_base(gpt, base, dtype, device, quantize)
    for name, folder in folders.items():
        donor = empty_network(base)
        added = install_saved(donor, folder, base)
        tensors = {key: t.to(device) for key, t in read_method(folder, donor, added).items()}
        if replaced := [key for key in tensors if is_base(key) or key.startswith("heads.")]:
            raise ValueError(f"{folder} replaces {replaced[0]}; side by side go methods that only add to the base")
        donor.load_state_dict(tensors, strict=False, assign=True)
        gpt.take(name, donor.requires_grad_(False).eval())
    return gpt.requires_grad_(False).eval()


def load_base(
    gpt: GPT,
    base: Folder,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    quantize: str = "none",
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Puts weights into a network built on the meta device, without a second copy in memory: a CPU tensor of the stored
    dtype is the memory-mapped file itself. What a method has added is initialised as its file says.

    A block is quantized as soon as it is loaded, so that never more than one is there in full. Tensors that require
    gradients are not quantized, and become float32, since an optimizer step is smaller than the last bit of a bfloat16
    weight.

    Args:
        dtype: dtype of the frozen weights; None: every tensor stays as it is stored.
        trained: tensors that replace the base's or belong to a method, from `read_method`.
    """
    trained = trained or {}
    parameters = dict(gpt.named_parameters(remove_duplicate=False))
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    parts = {None: [], **{i: [] for i in range(gpt.config.n_layer)}}  # None: what is in no block
    for name in parameters:
        if (is_base(name) and not (gpt.config.tie and name == "lm_head.weight")) or name in trained:
            parts[int(name.split(".")[1]) if name.startswith("blocks.") else None].append(name)
    for i, names in parts.items():
        tensors = {}
        for name in names:
            stored_name = "wte.weight" if name == "lm_head.weight" and base.config.tie else name  # a method untied it
            t = trained[name] if name in trained else base.tensor(stored_name)
            wide = torch.float32 if name in trainable and not trained else dtype
            tensors[name] = t.to(device, (wide or t.dtype) if is_base(name) else t.dtype)
            if stored_name != name and name not in trained:
                tensors[name] = tensors[name].clone()
        gpt.load_state_dict(tensors, strict=False, assign=True)
        if i is not None and quantize != "none":
            from lit_model.quantize import quantize as quantize_block

            unquantized = {name.removeprefix(f"blocks.{i}.") for name in names if name in trained or name in trainable}
            quantize_block(gpt.blocks[i], quantize, unquantized, last=i == gpt.config.n_layer - 1)
    gpt.tie()
    gpt.dtype = dtype
    initialize(gpt, device)


def initialize(module: nn.Module, device: torch.device | str) -> None:
    """Gives memory and initial values to every parameter that is still on the meta device."""
    for m in module.modules():
        if any(p.is_meta for p in m.parameters(recurse=False)):
            m.to_empty(device=device, recurse=False)
            m.reset_parameters()


def is_base(name: str) -> bool:
    """Whether a tensor is the network's own, and not a method's."""
    return ".deltas." not in name and not name.startswith(("virtual_", "heads."))


# ----------------------------------------------------------------------------------------------------- method folders


def method_file(method_dir: Path | str) -> Path:
    path = Path(method_dir)
    return path if path.suffix == ".safetensors" else path / "lit_method.safetensors"


def method_header(method_dir: Path | str) -> dict[str, str]:
    """What a method folder says of itself: `method`, `options` and `task` (JSON), `base` (identity), `quantize`."""
    path = method_file(method_dir)
    refuse_pointer(path)
    with reading(path):
        header = safe_open(path, framework="pt").metadata() or {}
        if header.get("method") not in METHODS or not {"options", "base"} <= header.keys():
            raise ValueError("its header names no method of lit-model")
        task_in(header)
    return header


def task_in(header: Mapping[str, str]) -> "Task | None":
    """What a method was trained to classify, from its `method_header`; None for text."""
    fields = json.loads(header.get("task", "{}"))
    if not fields:
        return None
    from lit_model.data.labels import Task

    return Task(**fields)


def read_method(method_dir: Path | str, gpt: GPT, added: set[str]) -> dict[str, Tensor]:
    """The trained tensors of a method folder, for a network that has the method installed.

    Raises ValueError unless they fit, and all that the method has `added` are there.
    """
    path = method_file(method_dir)
    with reading(path):
        with safe_open(path, framework="pt") as file:
            # clones: products depend in the last bit on how tensors are aligned, and those of a mapped file lie anyhow
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        shapes = {name: t.shape for name, t in gpt.state_dict().items()}
        if odd := [name for name, t in tensors.items() if shapes.get(name) != t.shape] or sorted(
            added - tensors.keys()
        ):
            raise ValueError(f"its tensor {odd[0]} is missing, or has no place or another shape in the model")
    return tensors


def save_method(
    path: Path,
    gpt: nn.Module,
    method: str,
    options: Any,
    base: str,
    task: "Task | None" = None,
    quantize: str = "none",
    write: bool = True,
) -> None:
    """Writes the trained tensors of `gpt`, and only those, with all that `load` needs to know in the header.

    Where they lie in slices, every process calls this, and one of them with `write`.

    Args:
        base: identity of the network that they were trained on, see `Folder.identity`.
        quantize: form that the base had in training.
    """
    tensors = {name: p.detach().contiguous() for name, p in gpt.named_parameters() if p.requires_grad}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            whole = t.full_tensor()
            tensors[name] = whole.cpu() if write else whole.new_empty(0)
    if write:
        module = method_module(method)
        if hasattr(module, "to_save"):
            method, options, tensors = module.to_save(gpt, tensors, options)
        save_tensors(path, tensors, method, options, base, task, quantize)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    method: str,
    options: Any,
    base: str,
    task: "Task | None" = None,
    quantize: str = "none",
) -> None:
    """Writes a method file."""
    options, task = (json.dumps(asdict(value) if value else {}) for value in (options, task))
    write_tensors(path, tensors, dict(method=method, options=options, task=task, base=base, quantize=quantize))
