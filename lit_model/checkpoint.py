"""Files. A checkpoint folder holds a whole network; a method folder holds only what a method has trained.

checkpoint_dir/   lit_model.safetensors   base weights
                  lit_config.json         shape, and the fingerprint of the weights
                  tokenizer.json or tokenizer.model, tokenizer_config.json
method_dir/       lit_method.safetensors  trained tensors; its header names the method, its options and the
                                          fingerprint of the base that they were trained on: generation needs no
                                          option typed again

A method only adds keys to a state dict and never renames the base's. So every checkpoint loads into every method, and
the keys that are missing afterwards are exactly the method's own.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_model import (
    adapter,
    adapter_v2,
    bottleneck,
    classify,
    full,
    ia3,
    lora,
    model,
    prefix,
    prompt,
    selective,
    several,
)
from lit_model.files import (
    as_dtype,
    blamed_on,
    read_json,
    read_yaml,
    refuse_pointer,
    replacing,
    stream_tensors,
    write_tensors,
    write_text,
)
from lit_model.quantize import Kind
from lit_model.quantize import quantize as quantize_block

# a method's file, and the dataclass of its options
METHODS = {
    "adapter": (adapter, adapter.Adapter),
    "adapter_v2": (adapter_v2, adapter_v2.AdapterV2),
    "bottleneck": (bottleneck, bottleneck.Bottleneck),
    "full": (full, None),
    "ia3": (ia3, ia3.IA3),
    "lora": (lora, lora.LoRA),
    "prefix": (prefix, prefix.Prefix),
    "prompt": (prompt, prompt.Prompt),
    "selective": (selective, selective.Selective),
}


def load(
    checkpoint_dir: Path | str,
    method_dir: Path | str | Sequence[Path | str] | Mapping[str, Path | str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Kind = "none",
) -> model.GPT:
    """The network in `checkpoint_dir`, with what `method_dir` has trained on it, ready to generate.

    Args:
        method_dir: the out_dir of a finetuning run, or one .safetensors file in it; several work together, in the order
            in which they stand; several with a name each lie side by side, see several.py.
        dtype: of the base weights and of all activations.
        quantize: how to keep the base weights, see quantize.py.
    Raises:
        FileNotFoundError: a file is not there. ValueError: it is broken, or the method was trained on another base.
    """
    if isinstance(method_dir, Mapping):
        return _side_by_side(checkpoint_dir, method_dir, device, dtype, quantize)
    with torch.device("meta"):
        gpt = model.GPT(model.Config.load(checkpoint_dir))
    folders = [method_dir] if isinstance(method_dir, (Path, str)) else method_dir or []
    methods = [method_header(folder)["method"] for folder in folders]
    if twice := [name for name in methods if methods.count(name) > 1]:
        raise ValueError(f"two of {', '.join(map(str, folders))} are a {twice[0]}, and a network has room for one")
    added = [_install(gpt, folder, checkpoint_dir) for folder in folders]
    trained = [_trained(folder, device) for folder in folders]
    _check_together(gpt, folders, trained)
    wanted = _shapes(gpt.state_dict())
    for folder, own, tensors in zip(folders, added, trained, strict=True):  # before any memory is taken
        _check_trained(folder, own, tensors, wanted)
    load_base(gpt, checkpoint_dir, dtype, device, quantize, keep={name for tensors in trained for name in tensors})
    for tensors in trained:
        tensors = {name: t.to(dtype) if is_base(name) else t for name, t in tensors.items()}
        gpt.load_state_dict(tensors, strict=False, assign=True)
        gpt.tie()
    return gpt.requires_grad_(False).eval()


def _check_trained(
    folder: Path | str, own: Collection[str], tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]
) -> None:
    """Raises ValueError unless the tensors of a method fit, and are all there."""
    _check_shapes(tensors, method_file(folder), wanted)
    if missing := sorted(own - tensors.keys()):
        raise ValueError(f"{method_file(folder)} lacks {len(missing)} tensors, such as {missing[0]}")


def _check_together(gpt: model.GPT, folders: Sequence[Path | str], trained: Sequence[Collection[str]]) -> None:
    """Raises ValueError where one method would undo another."""
    for i, folder in enumerate(folders):
        for j in range(i):
            if same := sorted(set(trained[i]) & set(trained[j])):
                raise ValueError(f"{folders[j]} and {folder} both hold {same[0]}: they do not go together")
    for name, linear in gpt.named_modules():
        if isinstance(linear, model.Linear):
            for method, delta in list(linear.deltas.items())[1:]:
                if getattr(delta, "first", False):
                    before = next(iter(linear.deltas))
                    raise ValueError(f"on {name} {method} has to act before {before}: name its folder first")


def _side_by_side(
    checkpoint_dir: Path | str, folders: Mapping[str, Path | str], device: Any, dtype: torch.dtype, quantize: Kind
) -> several.GPT:
    with torch.device("meta"):
        gpt = several.GPT(model.Config.load(checkpoint_dir))
    load_base(gpt, checkpoint_dir, dtype, device, quantize)
    for name, folder in folders.items():
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"{name!r} cannot be the name of {folder}: take letters, digits and '-'")
        with torch.device("meta"):
            donor = model.GPT(model.Config.load(checkpoint_dir))
        own, tensors = _install(donor, folder, checkpoint_dir), _trained(folder, device)
        if replaced := sorted(n for n in tensors if is_base(n) or n.startswith("heads.")):
            what = f"{len(replaced)} tensors of the base, such as {replaced[0]}"
            raise ValueError(f"{folder} replaces {what}; side by side go methods that only add to it")
        _check_trained(folder, own, tensors, _shapes(donor.state_dict()))
        donor.load_state_dict(tensors, strict=False, assign=True)
        gpt.take(name, donor)
    return gpt.requires_grad_(False).eval()


def _install(gpt: model.GPT, method_dir: Path | str, checkpoint_dir: Path | str) -> set[str]:
    """Adds the method of a folder to a network on the meta device. Returns the names of the tensors that it adds."""
    header = method_header(method_dir)
    if header["fingerprint"] != fingerprint_of(checkpoint_dir):
        settings = method_file(method_dir).parent / "hparams.yaml"
        with suppress(ValueError, OSError):
            if named := read_yaml(settings).get("checkpoint_dir"):
                checkpoint_dir = f"{checkpoint_dir}; its hparams.yaml names {named}"
        raise ValueError(f"{method_dir} was trained on another base than {checkpoint_dir}")
    method, options = METHODS[header["method"]]
    before = gpt.state_dict().keys()
    with blamed_on(method_file(method_dir)), torch.device("meta"):
        method.install(gpt, options(**json.loads(header["options"])) if options else None)
        if (task := task_in(header)) and task.head == "linear":
            classify.install(gpt, len(task.classes))
    return gpt.state_dict().keys() - before


def load_base(
    gpt: model.GPT,
    checkpoint_dir: Path | str,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    quantize: Kind = "none",
    keep: Container[str] = (),
) -> None:
    """Puts the base weights into a network built on the meta device, without a second copy in memory: a CPU tensor of
    the stored dtype is the memory-mapped file itself. What a method has added is initialised as its file says.
    Without a `dtype` the stored one is kept.

    A block is quantized as soon as it is loaded, so that never more than one is there in full; without the tensors that
    `keep` names, since what is trained is not quantized.
    """
    path = Path(checkpoint_dir) / "lit_model.safetensors"
    wanted = _shapes(gpt.state_dict())
    with open_tensors(path, device) as file:
        names = set(file.keys())
        if strange := sorted(names - wanted.keys()):
            raise ValueError(f"{path} has a tensor {strange[0]} that the model has no place for")
        tied = model.Config.load(checkpoint_dir).tie  # then lm_head.weight is not stored
        parted = tied and not gpt.config.tie  # a method did it
        if missing := [n for n in wanted if is_base(n) and n not in names and not (tied and n == "lm_head.weight")]:
            what = f"{len(missing)} tensors, such as {missing[0]}"
            raise ValueError(f"{path} lacks {what}; convert the checkpoint again")
        for block in (None, *range(gpt.config.n_layer)):  # None: what is in no block
            part = sorted(name for name in names if _block(name) == block)
            with blamed_on(path):
                tensors = {name: as_dtype(name, file.get_tensor(name), dtype) for name in part}
            _check_shapes(tensors, path, wanted)
            gpt.load_state_dict(tensors, strict=False, assign=True)
            if block is None and parted:
                gpt.lm_head.weight = nn.Parameter(gpt.wte.weight.detach().clone())
            if block is not None and quantize != "none":
                kept = [name.removeprefix(f"blocks.{block}.") for name in part if name in keep]
                quantize_block(gpt.blocks[block], quantize, kept, last=block == gpt.config.n_layer - 1)
    gpt.tie()
    gpt.dtype = dtype
    initialize(gpt, device)


def initialize(module: nn.Module, device: torch.device | str) -> None:
    """Gives memory and initial values to every parameter that is still on the meta device."""
    for m in module.modules():
        if any(p.is_meta for p in m.parameters(recurse=False)):
            m.to_empty(device=device, recurse=False)
            m.reset_parameters()


def freeze(gpt: model.GPT, trainable: Callable[[str, model.Config], bool], widen: bool = True) -> None:
    """Marks the parameters that are trainable(name, config) as such and keeps them in float32; freezes all others.

    In bfloat16 an optimizer step at a usual learning rate is smaller than the last bit of a weight, and lost.
    """
    for name, p in gpt.named_parameters():
        p.requires_grad_(trainable(name, gpt.config))
        if p.requires_grad and widen:
            p.data = p.data.float()


def save_method(
    path: Path,
    gpt: nn.Module,
    method: str,
    options: Any,
    fingerprint: str,
    task: classify.Task | None = None,
    quantize: Kind = "none",
    write: bool = True,
) -> None:
    """Writes the trained tensors of `gpt`, and only those, with all that `load` needs to know in the header.

    Where they lie in slices, every process calls this, and one of them with `write`.
    """
    tensors = {name: p.detach().contiguous() for name, p in gpt.named_parameters() if p.requires_grad}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            whole = t.full_tensor()
            tensors[name] = whole.cpu() if write else whole.new_empty(0)
    if write:
        module, _ = METHODS[method]
        if hasattr(module, "finish"):
            tensors, options = module.finish(gpt, tensors, options)
        save_tensors(path, tensors, method, options, fingerprint, task, quantize)


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    method: str,
    options: Any,
    fingerprint: str,
    task: classify.Task | None = None,
    quantize: Kind = "none",
) -> None:
    """Writes a method file. quantize: what the base was in training."""
    options, task = (json.dumps(asdict(value) if value else {}) for value in (options, task))
    header = dict(method=method, options=options, task=task, fingerprint=fingerprint, quantize=quantize)
    write_tensors(path, tensors, header)


def task_in(header: Mapping[str, str]) -> classify.Task | None:
    """What a method was trained to tell apart, from its `method_header`."""
    fields_of = json.loads(header.get("task", "{}"))
    return classify.Task(**fields_of) if fields_of else None


def method_file(method_dir: Path | str) -> Path:
    path = Path(method_dir)
    return path if path.suffix == ".safetensors" else path / "lit_method.safetensors"


def method_header(method_dir: Path | str) -> dict[str, str]:
    """What a method folder says of itself: `method`, `options` (JSON) and `fingerprint` of its base."""
    with open_tensors(method_file(method_dir)) as file:
        header = file.metadata() or {}
    if header.get("method") not in METHODS or not {"options", "fingerprint"} <= header.keys():
        raise ValueError(
            f"{method_file(method_dir)} is not a method file of lit-model: its header names no known method"
        )
    with blamed_on(method_file(method_dir)):
        task_in(header)
    return header


def save_checkpoint(
    out_dir: Path,
    config: model.Config,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint folder. lit_config.json comes last: where it stands, the folder is complete.

    Args:
        tensors: name -> tensor, or pairs of them in any order, of which one at a time is held in memory.
        tokenizer_files: name -> content, from convert.py.

    Raises ValueError, and leaves nothing, if the tensors are not exactly those of a network of this shape.
    """
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in model.GPT(config).state_dict().items()}
    if config.tie:
        del shapes["lm_head.weight"]
    digests: dict[str, str] = {}
    heads: list[str] = []  # a tied one is not stored

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, t in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if config.tie and name == "lm_head.weight":
                heads.append(digest("wte.weight", t.detach().cpu().contiguous()))
                continue
            if name in digests:
                raise ValueError(f"these weights do not make the network: {name} is there twice")
            if shapes.get(name) != tuple(t.shape):
                _wrong_shape(name, tuple(t.shape), shapes.get(name))
            digests[name] = digest(name, t := t.detach().cpu().contiguous())
            yield name, t
        for name in sorted(shapes.keys() - digests.keys()):
            _wrong_shape(name, None, shapes[name])
        if heads and heads != [digests["wte.weight"]]:
            raise ValueError("the output layer is said to be the embedding (tied), but is stored as something else")

    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        stream_tensors(out_dir / "lit_model.safetensors", checked(), shapes)
    except BaseException:
        if new:
            out_dir.rmdir()
        raise
    for name, content in tokenizer_files.items():
        with replacing(out_dir / name) as aside:
            aside.write_bytes(content)
    shape = {name: value for name, value in asdict(config).items() if name in _CONFIG_FIELDS}
    content = shape | {"fingerprint": combined(digests)}
    write_text(out_dir / "lit_config.json", json.dumps(content, indent=2) + "\n")


_CONFIG_FIELDS = {f.name for f in fields(model.Config)}  # without those of a method


def _wrong_shape(name: str, got: tuple | None, wanted: tuple | None) -> NoReturn:
    what = f"has the shape {got} instead of {wanted}"
    what = "is missing" if got is None else "is no part of it" if wanted is None else what
    raise ValueError(f"these weights do not make the network: {name} {what}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}


def digest(name: str, t: Tensor) -> str:
    """One line that tells a tensor from any other."""
    content = hashlib.sha256(memoryview(t.flatten().view(torch.uint8).numpy())).hexdigest()
    return f"{name} {t.dtype} {tuple(t.shape)} {content}\n"


def combined(digests: Mapping[str, str]) -> str:
    """The fingerprint of a network: sha256 over the `digest` of each tensor, sorted by name."""
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def fingerprint_of(checkpoint_dir: Path | str) -> str:
    return read_json(Path(checkpoint_dir) / "lit_config.json", "fingerprint")["fingerprint"]


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file; on the CPU they are views of the mapped file and cost no memory until read."""
    with open_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _trained(method_dir: Path | str, device: torch.device | str) -> dict[str, Tensor]:
    """In memory of their own: products depend in the last bit on how tensors are aligned, and those of a mapped file
    lie anyhow."""
    return {name: t.clone() for name, t in read_tensors(method_file(method_dir), device).items()}


def open_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """A safetensors file. Raises FileNotFoundError, or ValueError if it is broken."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    refuse_pointer(path)
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as e:
        raise ValueError(f"{path} is broken or only partly written ({e}); fetch or make it again") from None


def _check_shapes(tensors: Mapping[str, Tensor], path: Path, wanted: Mapping[str, torch.Size]) -> None:
    for name, t in tensors.items():
        if name not in wanted:
            raise ValueError(f"{path} has a tensor {name} that the model has no place for")
        if t.shape != wanted[name]:
            raise ValueError(f"{path}: {name} is {tuple(t.shape)}; the model wants {tuple(wanted[name])}")


def _block(name: str) -> int | None:
    """Index of the block that a tensor belongs to."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_base(name: str) -> bool:
    """Whether a tensor is the network's own, and not a method's."""
    return ".deltas." not in name and not name.startswith(("virtual_", "heads."))
