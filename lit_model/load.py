"""load(): a network from a checkpoint folder, plus the tensors that finetuning runs trained for it. The only file that
knows all methods.

A checkpoint folder is a Hugging Face folder (weights/folder.py). A method folder has the trained tensors in
lit_method.safetensors, whose header (`method_header`) says all that generation needs.

A method only adds keys to a state dict and never renames the base's. So every checkpoint loads into every method, and
the keys that are missing afterwards are exactly the method's own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_model.files import reading, refuse_pointer, stream_tensors
from lit_model.model import GPT
from lit_model.weights import demo
from lit_model.weights.folder import Folder

if TYPE_CHECKING:
    from lit_model.data.labels import Task
    from lit_model.data.tokenizer import Tokenizer
    from lit_model.methods.side_by_side import SideBySide

MethodDirs = Path | str | Sequence[Path | str]  # one method folder, or several: a list, or a text with commas

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
    """The options of a method, `options` instead of its defaults; None for full, which has none. Raises KeyError."""
    kind = METHODS[name]  # before anything of this name is imported
    return getattr(method_module(name), kind)(**options) if kind else None


def load(
    folder: Path | str,
    method_dir: MethodDirs | Mapping[str, Path | str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    quantize: str = "none",
) -> "GPT | SideBySide":
    """The network in `folder`, with what `method_dir` has trained on it, in eval mode.

    Args:
        folder: any Hugging Face folder of a supported family.
        method_dir: the out_dir of a finetuning run, one .safetensors file in it, or a folder of PEFT's. Of a list, or
            of a text with commas, all act together; a dict puts them side by side, see methods/side_by_side.py.
        dtype: dtype of the base weights and of all activations; None: as they are stored.
        quantize: form of the base weights: none, nf4, int8 or fp8, see quantize.py.
    Raises:
        FileNotFoundError: a file is not there. ValueError: it is broken, or the method was trained on another base.
    """
    base = Folder(folder)
    if isinstance(method_dir, Mapping):
        from lit_model.methods.side_by_side import SideBySide

        gpt, side_by_side = empty_network(base, SideBySide), method_dir
    else:
        gpt, side_by_side = empty_network(base), {}
        install_saved(gpt, method_dir, base)
    load_base(gpt.requires_grad_(False), base, dtype, device, quantize)
    for name, path in side_by_side.items():
        donor = empty_network(base)
        names = install_saved(donor, path, base)
        if donor.wte.deltas:
            raise ValueError(f"{path} adds tokens; side by side go methods over one vocabulary")
        if replaced := [key for key in names if is_base(key) or key.startswith("heads.") or ".experts." in key]:
            raise ValueError(f"{path} replaces {replaced[0]}; side by side go methods that only add to the base")
        gpt.take(name, donor.requires_grad_(False).eval())
    return gpt.eval()


def empty_network(base: Folder, kind: type[GPT] = GPT) -> GPT:
    """The network of a folder on the meta device, frozen, ready for a method."""
    with torch.device("meta"):
        return kind(base.config).requires_grad_(False)


def install_method(gpt: GPT, name: str, options: Any, task: "Task | None", tokens: Mapping[str, int] = {}) -> None:
    """Adds a method, the head of a task that has one, and new tokens to a network on the meta device."""
    with torch.device("meta"):
        method_module(name).install(gpt, options)
        if task and task.head == "linear":
            from lit_model.data import labels

            labels.install(gpt, len(task.classes))
        if tokens:
            method_module("tokens").install(gpt, tokens)


def install_saved(gpt: GPT, method_dir: MethodDirs | None, base: Folder) -> list[str]:
    """Adds the method of a folder, with its trained tensors, to a network on the meta device; of several one after the
    other. Returns their names.

    Raises ValueError if one was trained on another base, its tensors are not those of the method, or it would undo
    another one.
    """
    found: list[str] = []
    for i, folder in enumerate(method_dirs(method_dir)):
        slots = {
            path: m for path, m in gpt.named_modules() if path.endswith(("deltas", "virtual_tokens", "virtual_keys"))
        }
        for slot in slots.values() if i else ():
            for name in [name for name in slot if name != "tokens"]:
                slot[f"{name}_{i}"] = slot.pop(name)  # the next one may be of the same kind
        names = _install_saved(gpt, folder, base)
        undone = [name for name in names if name in found and (is_base(name) or "deltas.tokens." in name)]
        undone += [path for path, slot in slots.items() if len(slot) > 1 and hasattr([*slot.values()][-1], "is_first")]
        if undone:
            raise ValueError(
                f"{folder} would undo what another method has done to {undone[0]}: name it first, or alone"
            )
        found += names
    return found


def _install_saved(gpt: GPT, folder: Path, base: Folder) -> list[str]:
    (header, tensors), path = read_method(folder, base), method_file(folder)
    if header["base"] != base.identity:
        raise ValueError(f"{folder} was trained on another base than {base.path}")
    before = gpt.state_dict().keys()
    with reading(path):
        name = header["method"]
        install_method(gpt, name, method_options(name, **header["options"]), header["task"], header["tokens"])
        if gpt.config.tie and "lm_head.weight" in tensors and "wte.weight" not in tensors:
            gpt.config = replace(gpt.config, tie=False)
            gpt.lm_head.weight = nn.Parameter(gpt.wte.weight, requires_grad=False)
        absent, strange = gpt.load_state_dict(tensors, strict=False, assign=True)
        once = {name for name, _ in gpt.named_parameters()}  # what is shared has two names, and one in the file
        if odd := strange or [name for name in absent if name in once and name not in before]:
            raise ValueError(f"its tensor {odd[0]} is missing, or has no place in the model")
    return list(tensors)


def load_base(
    gpt: GPT, base: Folder, dtype: torch.dtype | None, device: torch.device | str = "cpu", quantize: str = "none"
) -> None:
    """Puts weights in the place of those on the meta device, without a second copy in memory: a CPU tensor of the
    stored dtype is the memory-mapped file itself. What a method has added is initialised as its file says.

    A block is quantized as soon as it is loaded, so that never more than one is there in full. Tensors that require
    gradients, or that `install_saved` has brought, are not quantized. The former become float32, since an optimizer
    step is smaller than the last bit of a bfloat16 weight; the others get `dtype`, or without one stay as stored.
    """
    parameters = dict(gpt.named_parameters(remove_duplicate=False))
    for block, names in groupby(parameters, lambda name: name.split(".")[1] if name.startswith("blocks.") else ""):
        unquantized = set()
        for name in names:
            p, is_head = parameters[name], name == "lm_head.weight"
            if (p.is_meta and not is_base(name)) or (is_head and gpt.config.tie):
                continue
            if p.requires_grad or not p.is_meta:
                unquantized.add(name.removeprefix(f"blocks.{block}."))
            t = base.tensor(name) if p.is_meta else p.detach()
            wide = torch.float32 if p.requires_grad else dtype
            # a method has untied the copy
            t = t.to(device, (wide or t.dtype) if is_base(name) else t.dtype, copy=is_head and base.config.tie)
            owner, _, leaf = name.rpartition(".")
            setattr(gpt.get_submodule(owner), leaf, nn.Parameter(t, p.requires_grad))
        if block and quantize != "none":
            from lit_model.quantize import quantize as quantize_block

            quantize_block(gpt.blocks[int(block)], quantize, unquantized, last=int(block) == gpt.config.n_layer - 1)
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


def method_dirs(method_dir: MethodDirs | None) -> list[Path]:
    """Those of a list, of a text with commas between them, or the one; [] for None."""
    if method_dir is None or not isinstance(method_dir, str | Path):
        return [Path(folder) for folder in method_dir or ()]
    return [Path(part) for part in ([method_dir] if Path(method_dir).exists() else str(method_dir).split(","))]


def named_dirs(text: str) -> dict[str, Path]:
    """name=folder,name=folder as a dict; without a name that of the folder. Raises ValueError for a name twice."""
    pairs = [part.rpartition("=") for part in text.split(",") if part]
    folders = {name or Path(folder).resolve().name: Path(folder) for name, _, folder in pairs}
    if len(folders) < len(pairs):
        raise ValueError(f"{text!r} must be name=folder,name=folder, each name once")
    return folders


def is_peft(method_dir: Path | str) -> bool:
    """Whether it is a folder of PEFT's, see weights/peft.py."""
    return (Path(method_dir) / "adapter_config.json").is_file()


def method_file(method_dir: Path | str) -> Path:
    path = Path(method_dir)
    return path if path.suffix == ".safetensors" else path / "lit_method.safetensors"


def read_method(method_dir: Path | str, base: Folder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`method_header`, and the tensors by name."""
    if is_peft(method_dir):
        from lit_model.weights.peft import read_peft

        return read_peft(Path(method_dir), base)
    header, path = method_header(method_dir), method_file(method_dir)
    with reading(path):
        # clones: products depend in the last bit on how tensors are aligned, and those of a mapped file lie anyhow
        return header, {name: t.clone() for name, t in load_file(path).items()}


def method_header(method_dir: Path | str) -> dict[str, Any]:
    """What a method folder says of itself: `method`, `options`, `base` (identity), `task` (what it was trained to
    classify; None for text), `tokens` (id of each token that it adds) and `quantize` (the form that the base had).
    PEFT's folders name neither options nor base."""
    if is_peft(method_dir):
        return dict(method=Path(method_dir).name, options={}, base=None, task=None, tokens={}, quantize="none")
    path = method_file(method_dir)
    refuse_pointer(path)
    with reading(path):
        stored = safe_open(path, framework="pt").metadata()
        header = {name: stored[name] for name in ("method", "base", "quantize")}
        options, task = (json.loads(stored[name]) for name in ("options", "task"))
        tokens = {str(text): int(i) for text, i in json.loads(stored.get("tokens", "{}")).items()}
        if task:
            from lit_model.data.labels import Task

            task = Task(**task)
    return header | dict(options=options, task=task or None, tokens=tokens)


def load_tokenizer(folder: Path | str, method_dir: MethodDirs | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint folder, with the tokens of methods. Raises ValueError if their ids differ."""
    from lit_model.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    for method in method_dirs(method_dir):
        tokens = method_header(method)["tokens"]
        if tokens and tokenizer.add([*tokens]) != [*tokens.values()]:
            raise ValueError(f"{folder}: its tokenizer is not the one that {method} added tokens to")
    return tokenizer


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
    """Writes the trained tensors of `gpt`, and only those, with all that `load` needs to know in the header, see
    `method_header`. Where they lie in slices, every process calls this, and one of them with `write`.
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
        options, task = (json.dumps(asdict(value) if value else {}) for value in (options, task))
        tokens = json.dumps(gpt.wte.deltas["tokens"].tokens if "tokens" in gpt.wte.deltas else {})
        header = dict(method=method, options=options, task=task, tokens=tokens, base=base, quantize=quantize)
        stream_tensors(path, tensors.items(), {name: t.shape for name, t in tensors.items()}, header)


# ------------------------------------------------------------------------------------------------- options of scripts


@dataclass(kw_only=True)
class NetworkOptions:
    """Which network a script asks, and how it is held."""

    checkpoint_dir: Path = demo.DEMO_CHECKPOINT
    """Hugging Face folder of the base network; default: the demo's, fetched once"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """form of the base weights, such as that of the runs"""
    device: str = "auto"
    """auto: the GPU if there is one; or cpu, cuda, cuda:1"""

    def load(self, method_dir: MethodDirs | Mapping[str, Path] | None = None) -> "GPT | SideBySide":
        demo.fetch_if_demo(self.checkpoint_dir)
        device = choose_device(self.device)
        auto = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, auto if self.dtype == "auto" else self.dtype)
        return load(self.checkpoint_dir, method_dir, device, dtype, self.quantize)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"there is no device {name!r} here: {str(e).splitlines()[0]}") from None
