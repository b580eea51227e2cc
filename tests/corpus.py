"""Malformed files, and odd but legal ones: each is a small valid file of its kind, changed in one way.

`valid(folder, tiny)` writes the valid files once; a `Case` changes a copy of them. The script that reads them and the
name that its error line must have are those of its kind, see KINDS.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from conftest import LLAMA, WORDS
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as spm

from finetune import lora as lora_script
from generate import base as generate_base
from lit_model.methods import lora
from lit_model import model
from lit_model.load import fingerprint_of, save_checkpoint, save_method
from lit_model.weights.folder import _HF_LLAMA, tokenizer_files
from scripts import convert_gguf, convert_hf, convert_meta

Make = Callable[[Path], object]


@dataclass
class Kind:
    """How files of a kind are read."""

    script: ModuleType
    args: str
    copied: tuple[str, ...]
    """of the valid files"""
    names: tuple[str, ...]
    """of the file and of its folder, of which an error has to name one"""


@dataclass
class Case:
    kind: str
    what: str
    make: Make
    legal: bool = False
    """read without an error, odd as it is"""
    more: tuple[str, ...] = ()
    """arguments"""


GENERATE = "--checkpoint_dir base --max_new_tokens 2 --device cpu"
TRAIN = (
    "--checkpoint_dir base --out_dir out --devices cpu --train.max_steps 1 --train.batch_size 2 --train.sample= "
    "--prompt.max_length 64 --prompt.val_fraction 0 --prompt.style {{instruction}}"
)
HF = "--src_dir hf --out_dir new"
KINDS = {
    "gguf": Kind(convert_gguf, "--src m.gguf --out_dir new", ("m.gguf",), ("m.gguf",)),
    "checkpoint": Kind(generate_base, GENERATE, ("base",), ("lit_model.safetensors", "base")),
    "method": Kind(generate_base, GENERATE + " --method_dir run", ("base", "run"), ("lit_method.safetensors", "run")),
    "hf safetensors": Kind(convert_hf, HF, ("hf",), ("hf",)),
    "hf bin": Kind(convert_hf, HF, ("hf",), ("pytorch_model.bin", "hf")),
    "hf index": Kind(convert_hf, HF, ("hf",), ("hf",)),
    "hf config": Kind(convert_hf, HF, ("hf",), ("hf/config.json", "hf")),
    "hf tokenizer": Kind(convert_hf, HF, ("hf",), ("hf",)),
    "meta": Kind(convert_meta, "--src_dir meta --out_dir new --block_size 64", ("meta",), ("meta",)),
    "lit_config": Kind(generate_base, GENERATE, ("base",), ("base", "the model's context of 1 ")),
    "tokenizer": Kind(generate_base, GENERATE, ("base",), ("base",)),
    "sentencepiece": Kind(generate_base, GENERATE.replace("base", "sp"), ("sp",), ("sp",)),
    "chat template": Kind(generate_base, GENERATE + " --style chat", ("base",), ("base", "checkpoint's chat template")),
    "hparams": Kind(
        generate_base, GENERATE + " --method_dir run", ("base", "run"), ("run/hparams.yaml", "style 'abc'")
    ),
    "config yaml": Kind(lora_script, "--config c.yaml " + TRAIN, ("base", "data.json"), ("c.yaml", "train.lr")),
    "data": Kind(lora_script, TRAIN + " --data {data}", ("base",), ("{data}",)),
    "output": Kind(convert_hf, HF, ("hf",), ("new",)),
}


# ---------------------------------------------------------------------------------------------------- the valid files

SMALL = {**LLAMA, "vocab_size": 400, "block_size": 64, "n_layer": 1, "n_embd": 32, "n_hidden": 32}


def valid(folder: Path, tiny: Path) -> None:
    """Writes one valid file, or folder, of each kind."""
    torch.manual_seed(0)
    tokenizer = tokenizer_files(tiny / "base")
    gpt = model.GPT(model.Config(**SMALL))
    save_checkpoint(folder / "base", gpt.config, gpt.state_dict(), tokenizer)
    with_lora = lora.GPT(lora.Config(**SMALL))
    with_lora.requires_grad_(False)
    for name, p in with_lora.named_parameters():
        p.requires_grad_(".deltas." in name)
    (folder / "run").mkdir()
    save_method(folder / "run/lit_method.safetensors", with_lora, "lora", lora.LoRA(), fingerprint_of(folder / "base"))
    (folder / "run/hparams.yaml").write_text("prompt:\n  style: '{instruction}'\n")
    rows = [{"instruction": f"{i} {a}", "output": b} for i, (a, b) in enumerate(zip(WORDS, reversed(WORDS)))]
    (folder / "data.json").write_text(json.dumps(rows))
    write_sentencepiece(folder)
    files = {"tokenizer.model": (folder / "sp.model").read_bytes()}
    small = model.GPT(model.Config(**SMALL))
    save_checkpoint(folder / "sp", small.config, small.state_dict(), files)
    write_hf(folder / "hf", gpt, tokenizer)
    write_meta(folder / "meta", gpt, files)
    (folder / "m.gguf").write_bytes(gguf_file())


def write_sentencepiece(folder: Path) -> None:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"{a} {b}" for a in WORDS for b in WORDS))
    SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip


def write_hf(folder: Path, gpt: model.GPT, tokenizer: dict[str, bytes]) -> None:
    folder.mkdir()
    back = {ours: theirs for theirs, ours in _HF_LLAMA.items()}
    tensors = {}
    for name, t in gpt.state_dict().items():
        stem, _, ending = name.rpartition(".")
        prefix = ""
        if stem.startswith("blocks."):
            _, layer, stem = stem.split(".", 2)
            prefix = f"model.layers.{layer}."
        tensors[f"{prefix}{back[stem]}.{ending}"] = t.clone()
    save_file(tensors, folder / "model.safetensors")
    c = gpt.config
    config = dict(
        model_type="llama", vocab_size=c.vocab_size, max_position_embeddings=c.block_size, eos_token_id=1,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        hidden_size=c.n_embd, intermediate_size=c.n_hidden, rms_norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)


def write_meta(folder: Path, gpt: model.GPT, tokenizer: dict[str, bytes]) -> None:
    folder.mkdir()
    names = {"wte": "tok_embeddings", "norm_f": "norm", "lm_head": "output", "norm_1": "attention_norm"}
    names |= {"norm_2": "ffn_norm", **{f"attn.{p}_proj": f"attention.w{p}" for p in "qkvo"}}
    names |= {f"mlp.{p}_proj": f"feed_forward.w{i}" for i, p in enumerate(("gate", "down", "up"), 1)}
    tensors = {}
    for name, t in gpt.state_dict().items():
        stem = name.removesuffix(".weight")
        layer = stem.startswith("blocks.")
        tensors[("layers.0." if layer else "") + names[stem.removeprefix("blocks.0.")] + ".weight"] = t.clone()
    torch.save(tensors, folder / "consolidated.00.pth")
    c = gpt.config
    params = dict(dim=c.n_embd, n_layers=c.n_layer, n_heads=c.n_head, n_kv_heads=c.n_kv_head, norm_eps=1e-5)
    (folder / "params.json").write_text(json.dumps(params | dict(vocab_size=c.vocab_size)))
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)


# ------------------------------------------------------------------------------------------------- how files are made


def put(name: str, content: bytes | str) -> Make:
    return lambda d: (d / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, n: int) -> Make:
    """Keeps the first n bytes; of a negative n, all but the last."""
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:n])


def both(*makes: Make) -> Make:
    return lambda d: [make(d) for make in makes]


def fields(name: str, **changes: Any) -> Make:
    """Changes fields of a JSON object; those that become ... are left away."""

    def make(d: Path) -> None:
        content = json.loads((d / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (d / name).write_text(json.dumps(content))

    return make


def spelled(name: str, key: str, text: str) -> Make:
    """Adds a field to a JSON object as it is spelled, so that Python's json need not be able to write it."""

    def make(d: Path) -> None:
        content = json.loads((d / name).read_text())
        content.pop(key, None)
        (d / name).write_text(json.dumps(content)[:-1] + f', "{key}": {text}' + "}")

    return make


def folder_for(name: str) -> Make:
    return both(lambda d: (d / name).unlink(missing_ok=True), lambda d: (d / name).mkdir())


def link(name: str, to: str) -> Make:
    return both(lambda d: (d / name).unlink(missing_ok=True), lambda d: (d / name).symlink_to(to))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
DEEP = 100_000
NO_OBJECTS = {  # where a JSON object has to be
    "nothing": b"",
    "spaces": b" \n\n",
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"1",
    "a text": b'"abc"',
    "half an object": b'{"a": 1, ',
    "two objects": b"{} {}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "NUL bytes": b"\0" * 64,
    "random bytes": bytes(range(128, 256)),
    "deeply nested lists": b"[" * DEEP + b"]" * DEEP,
    "deeply nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a pointer of Git LFS": POINTER.encode(),
}


def no_objects(kind: str, name: str, *skip: str) -> Iterator[Case]:
    for what, content in NO_OBJECTS.items():
        if what not in skip:
            yield Case(kind, f"{name}: {what}", put(name, content))
    yield Case(kind, f"{name}: a folder", folder_for(name))
    yield Case(kind, f"{name}: a device without end", link(name, "/dev/zero"))


# ------------------------------------------------------------------------------------------------------- safetensors


def tensors_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def in_header(name: str, change: Callable[[dict], Any], length: int | None = None) -> Make:
    """Changes the header of a safetensors file."""

    def make(d: Path) -> None:
        content = (d / name).read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        made = change(header)
        (d / name).write_bytes(tensors_file(header if made is None else made, content[end:], length))

    return make


def in_tensors(name: str, change: Callable[[dict], Any]) -> Make:
    """Changes the tensors, not what the header says beside."""

    def make(d: Path) -> None:
        with open(d / name, "rb") as file:
            about = json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).get("__metadata__")
        tensors = {key: t.clone() for key, t in load_file(d / name).items()}
        change(tensors)
        save_file(tensors, d / name, about)

    return make


def safetensors(kind: str, name: str, some: str) -> Iterator[Case]:
    """`some` is a tensor of the file."""
    say = lambda what, make, **options: Case(kind, f"{name}: {what}", make, **options)  # noqa: E731
    for what, content in {
        "nothing": b"",
        "seven bytes": b"\0" * 7,
        "a header of no length": struct.pack("<Q", 0),
        "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of 2**40 bytes": struct.pack("<Q", 2**40) + b"{}",
        "a header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
        "a header that is a list": tensors_file([], b""),
        "a header that is no JSON": tensors_file(b"{{{", b""),
        "a header in UTF-16": tensors_file("{}".encode("utf-16"), b""),
        "a header of deep objects": tensors_file(b'{"a":' * DEEP, b""),
        "a pickle": pickle.dumps({"a": 1}),
        "a pointer of Git LFS": POINTER.encode(),
        "text": b"hello",
        "no tensors": tensors_file({}, b""),
    }.items():
        yield say(what, put(name, content))
    yield say("half of it", cut(name, 3000))
    yield say("a byte too few", cut(name, -1))
    yield say("a byte too many", lambda d: (d / name).write_bytes((d / name).read_bytes() + b"x"))
    yield say("a folder", folder_for(name))
    entry = lambda **changes: in_header(name, lambda h: h[some].update(changes))  # noqa: E731
    yield say("a shape of 2**40", entry(shape=[2**40, 2**40]))
    yield say("a shape of 2**63", entry(shape=[2**63]))
    yield say("a negative shape", entry(shape=[-1, 4]))
    yield say("a shape of text", entry(shape="4"))
    yield say("offsets behind the end", entry(data_offsets=[2**40, 2**41]))
    yield say("offsets backwards", entry(data_offsets=[100, 0]))
    yield say("an unknown type", entry(dtype="F37"))
    yield say("a type of other size", entry(dtype="F64"))
    yield say("a deep tensor entry", in_header(name, lambda h: h.update(x=None)))
    yield say("two tensors in one place", in_header(name, lambda h: h.update(x=h[some])))
    yield say("metadata of numbers", in_header(name, lambda h: h.update(__metadata__={"a": 1})))
    yield say("a tensor too few", in_tensors(name, lambda t: t.pop(some)))
    yield say("a tensor too many", in_tensors(name, lambda t: t.update(x=torch.zeros(1))))
    yield say(
        "a tensor with a name of 10,000 letters", in_tensors(name, lambda t: t.update({"x" * 10_000: torch.zeros(1)}))
    )
    yield say("a name that moves the cursor", in_tensors(name, lambda t: t.update({"\x1b[2J\r\n": torch.zeros(1)})))
    yield say("a scalar", in_tensors(name, lambda t: t.update({some: torch.tensor(1.0)})))
    yield say("no elements", in_tensors(name, lambda t: t.update({some: torch.zeros(0, 4)})))
    yield say("a layer of number 10**30", in_tensors(name, lambda t: t.update({f"blocks.{10**30}.x": torch.zeros(1)})))


def hf_safetensors() -> Iterator[Case]:
    yield from safetensors("hf safetensors", "hf/model.safetensors", "model.norm.weight")
    for kind in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        change = lambda t, kind=kind: t.update({"model.norm.weight": t["model.norm.weight"].to(kind)})  # noqa: E731
        yield Case("hf safetensors", f"weights of {kind}", in_tensors("hf/model.safetensors", change))


def checkpoint() -> Iterator[Case]:
    name = "base/lit_model.safetensors"
    yield from safetensors("checkpoint", name, "norm_f.weight")
    nan = lambda t: t.update({"norm_f.weight": t["norm_f.weight"] * torch.nan})  # noqa: E731
    yield Case("checkpoint", "weights that are no numbers", in_tensors(name, nan))
    inf = lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * torch.inf})  # noqa: E731
    yield Case("checkpoint", "weights without end", in_tensors(name, inf))
    for kind in (torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bool):
        change = lambda t, kind=kind: t.update({"norm_f.weight": t["norm_f.weight"].to(kind)})  # noqa: E731
        yield Case("checkpoint", f"weights of {kind}", in_tensors(name, change))


def method() -> Iterator[Case]:
    name = "run/lit_method.safetensors"
    yield from safetensors("method", name, "blocks.0.attn.q_proj.deltas.lora.A")
    about = lambda **changes: in_header(name, lambda h: h["__metadata__"].update(changes))  # noqa: E731
    options = lambda **changes: about(options=json.dumps(changes))  # noqa: E731
    for what, make in {
        "no metadata": in_header(name, lambda h: h.pop("__metadata__") and None),
        "an unknown method": about(method="mamba"),
        "a method that is a module": about(method="os.system"),
        "a method with other options": about(method="prefix"),
        "full, with tensors of LoRA": about(method="full"),
        "another fingerprint": about(fingerprint="0"),
        "options that are no JSON": about(options="{"),
        "options that are a list": about(options="[1]"),
        "deep options": about(options="[" * DEEP),
        "an unknown option": options(r=8, x=1),
        "a rank of 2**40": options(r=2**40),
        "a rank of 2**30": options(r=2**30),
        "a rank of 2**63": options(r=2**63),
        "a rank of 10**30": options(r=10**30),
        "a negative rank": options(r=-1),
        "a rank that is text": options(r="eight"),
        "no rank": options(r=None),
        "targets that are a list": options(targets=["q_proj"]),
        "targets that are no expression": options(targets="("),
        "an unknown target": options(targets="nothing"),
        "alpha that is text": options(alpha="much"),
        "a task that is no JSON": about(task="{"),
        "a task that is a list": about(task="[1]"),
        "a task of other fields": about(task='{"x": 1}'),
        "a linear head": about(task='{"classes": ["a"], "head": "linear", "question": ""}'),
        "a task without classes": about(task='{"classes": 5, "head": "linear", "question": ""}'),
        "a prompt of 2**40 tokens": about(method="prompt", options='{"length": 1099511627776}'),
        "a prefix of 2**31 tokens": about(method="prefix", options='{"length": 2147483648}'),
        "an adapter of 2**34 tokens": about(method="adapter", options='{"prompt_length": 17179869184}'),
        "a bottleneck of 2**32": about(method="bottleneck", options='{"size": 4294967296}'),
    }.items():
        yield Case("method", what, make)


# ---------------------------------------------------------------------------------------------------- files of pickle


class Reduces:
    """Unpickled without care, it makes a file."""

    def __init__(self, call: Callable, *args: Any):
        self.reduced = call, args

    def __reduce__(self) -> tuple:
        return self.reduced


MARKER = "it-ran"  # the code of a checkpoint would make this file


def harmful() -> Reduces:
    return Reduces(os.mkdir, MARKER)


def rezipped(name: str, change: Callable[[str, bytes], bytes | None], compress: int = zipfile.ZIP_STORED) -> Make:
    """Changes the members of a zip file; None leaves one away."""

    def make(d: Path) -> None:
        made = io.BytesIO()
        with zipfile.ZipFile(d / name) as old, zipfile.ZipFile(made, "w", compress) as new:
            for member in old.namelist():
                if (content := change(member, old.read(member))) is not None:
                    new.writestr(member, content)
        (d / name).write_bytes(made.getvalue())

    return make


def huge_storage(shape: tuple[int, ...], legacy: bool) -> Make:
    """A tensor of 4 numbers that says it is of `shape`: torch has to refuse it the memory."""

    class Lies:
        def __init__(self, t: torch.Tensor):
            self.t = t

        def __reduce__(self) -> tuple:
            stride = [1] * len(shape)
            return torch._utils._rebuild_tensor_v2, (
                self.t._typed_storage(),
                0,
                shape,
                tuple(stride),
                False,
                OrderedDict(),
            )

    def make(d: Path, name: str) -> None:
        content = {"model.norm.weight": Lies(torch.zeros(4))}
        torch.save(content, d / name, _use_new_zipfile_serialization=not legacy)

    return make


def pickled(kind: str, name: str, prepare: Make, some: str) -> Iterator[Case]:
    say = lambda what, make, **options: Case(kind, f"{name}: {what}", both(prepare, make), **options)  # noqa: E731
    saved = lambda content, **options: lambda d: torch.save(content, d / name, **options)  # noqa: E731
    old = dict(_use_new_zipfile_serialization=False)
    changed = lambda **new: lambda d: torch.save(torch.load(d / name) | new, d / name)  # noqa: E731
    yield say("a pickle that runs code", put(name, pickle.dumps(harmful())))
    yield say("a pickle that runs code, protocol 2", put(name, pickle.dumps({"a": harmful()}, 2)))
    yield say("a zip file that runs code", saved({some: harmful()}))
    yield say("a zip file that runs eval", saved({some: Reduces(eval, f"__import__('os').mkdir('{MARKER}')")}))
    yield say("code in the place of a name", saved({harmful(): torch.zeros(1)}))
    yield say("the old format that runs code", saved({some: harmful()}, **old))
    yield say("nothing", put(name, b""))
    yield say("text", put(name, "hello"))
    yield say("P alone", put(name, "P"))
    yield say("a pointer of Git LFS", put(name, POINTER))
    yield say("a folder", folder_for(name))
    yield say("half of it", cut(name, 4000))
    yield say("300 bytes of it", cut(name, 300))
    yield say("a byte too few", cut(name, -1))
    yield say("the old format, half of it", both(saved({some: torch.zeros(64)}, **old), cut(name, 300)))
    yield say("an empty zip file", put(name, b"PK\x05\x06" + b"\0" * 18))
    yield say("a list", saved([torch.zeros(2)]))
    yield say("a tensor alone", saved(torch.zeros(2)))
    yield say("numbers by name", saved({"a": 1}))
    yield say("tensors by number", saved({1: torch.zeros(1)}))
    yield say("none", saved({}))
    yield say("one of another shape", changed(**{some: torch.zeros(3)}))
    yield say("one of no place", changed(x=torch.zeros(3)))
    yield say("a sparse one", changed(**{some: torch.zeros(32).to_sparse()}))
    yield say("one expanded to 2**40", changed(**{some: torch.zeros(1).expand(2**40)}))
    yield say("one of int64", changed(**{some: torch.zeros(32, dtype=torch.int64)}))
    yield say("a scalar", changed(**{some: torch.tensor(1.0)}))
    yield say("one on the meta device", changed(**{some: torch.zeros(32, device="meta")}))
    yield say("a nested one", changed(**{some: {"a": torch.zeros(32)}}))
    yield say("compressed", rezipped(name, lambda _, content: content, zipfile.ZIP_DEFLATED))
    bomb = rezipped(name, lambda m, content: content if m.endswith(".pkl") else b"\0" * 10**7, zipfile.ZIP_DEFLATED)
    yield say("a zip bomb", bomb)
    yield say("without its data", rezipped(name, lambda m, content: None if "/data/" in m else content))
    yield say("without its pickle", rezipped(name, lambda m, content: None if m.endswith(".pkl") else content))
    yield say("with short data", rezipped(name, lambda m, content: content[:5] if "/data/" in m else content))
    for legacy in (False, True):
        for shape in ((2**28,), (2**40,), (2**62, 2)):
            make = huge_storage(shape, legacy)
            what = f"4 numbers that say they are {shape}" + (", the old format" if legacy else "")
            yield say(what, lambda d, make=make: make(d, name))


def hf_bin() -> Iterator[Case]:
    def prepare(d: Path) -> None:
        torch.save(load_file(d / "hf/model.safetensors"), d / "hf/pytorch_model.bin")
        (d / "hf/model.safetensors").unlink()

    name = "hf/pytorch_model.bin"
    yield from pickled("hf bin", name, prepare, "model.norm.weight")
    for legacy in (False, True):  # the shape is right: it is the file that has not so many
        lies = huge_storage((2**28,), legacy)
        make = both(prepare, fields("hf/config.json", hidden_size=2**28), lambda d, lies=lies: lies(d, name))
        yield Case("hf bin", f"4 numbers that are as many as config.json has{', old' * legacy}", make)


def meta() -> Iterator[Case]:
    yield from pickled("meta", "meta/consolidated.00.pth", lambda d: None, "norm.weight")
    yield from no_objects("meta", "meta/params.json")
    change = lambda **changes: fields("meta/params.json", **changes)  # noqa: E731
    for what, make in {
        "no dim": change(dim=...),
        "a dim of 2**40": change(dim=2**40),
        "a dim of 2**63": change(dim=2**63),
        "a dim that is text": change(dim="32"),
        "a dim of 0": change(dim=0),
        "a dim that is a list": change(dim=[32]),
        "10**9 layers": change(n_layers=10**9),
        "1,000 layers": change(n_layers=1000),
        "3 heads": change(n_heads=3),
        "heads that are true": change(n_heads=True),
        "key heads that do not divide": change(n_kv_heads=3),
        "a vocabulary of text": change(vocab_size="400"),
        "a vocabulary of 2**40": change(vocab_size=2**40),
        "no vocabulary": change(vocab_size=None),
        "eps that is no number": spelled("meta/params.json", "norm_eps", "NaN"),
        "eps of 1e400": spelled("meta/params.json", "norm_eps", "1e400"),
        "a base of rope without end": spelled("meta/params.json", "rope_theta", "Infinity"),
        "a slice that is not there": lambda d: (d / "meta/consolidated.00.pth").rename(d / "meta/consolidated.01.pth"),
        "a slice twice": lambda d: shutil.copy(d / "meta/consolidated.00.pth", d / "meta/consolidated.01.pth"),
        "a tokenizer of tiktoken": put("meta/tokenizer.model", b"IQ== 0\nIg== 1\n"),
    }.items():
        yield Case("meta", what, make)
    twice = spelled("meta/params.json", "dim", "32, " * 0 + '7, "dim": 32')
    yield Case("meta", "params.json with a key twice", twice, legal=True)


# ---------------------------------------------------------------------------------------------- JSON of Hugging Face


def hf_index() -> Iterator[Case]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        name = f"hf/{stem}.index.json"
        alone = lambda d: (d / "hf/model.safetensors").rename(d / "hf/one.safetensors")  # noqa: E731
        for case in no_objects("hf index", name):
            case.make = both(alone, case.make)
            if not case.what.endswith(("a folder", "without end")) or stem != "model.safetensors":
                yield case
        for what, weights in {
            "no map": ...,
            "a list": ["one.safetensors"],
            "numbers": {"x": 1},
            "nothing": {},
            "..": {"x": "../secret"},
            "an absolute name": {"x": "/etc/hostname"},
            "a folder": {"x": "sub/one.safetensors"},
            "the folder itself": {"x": "."},
            "its parent": {"x": ".."},
            "no name": {"x": ""},
            "a NUL byte": {"x": "a\0b"},
            "half a character": {"x": "\ud800"},
            "a name of 10,000 letters": {"x": "x" * 10_000},
            "a file that is not there": {"x": "two.safetensors"},
            "a file of another kind": {"x": "config.json"},
            "a backslash": {"x": "..\\secret"},
        }.items():
            content = json.dumps({} if weights is ... else {"weight_map": weights})
            yield Case("hf index", f"{name}: its map is {what}", both(alone, put(name, content)))
        deep = '{"weight_map": ' + '{"a":' * 500 + "1" + "}" * 501
        yield Case("hf index", f"{name}: a deep map", both(alone, put(name, deep)))
    name = "hf/model.safetensors.index.json"
    twice = '{"weight_map": {"a": "two.safetensors"}, "weight_map": {"a": "model.safetensors"}}'
    yield Case("hf index", "a map twice, the last one right", put(name, twice), legal=True)


def hf_config() -> Iterator[Case]:
    name = "hf/config.json"
    yield from no_objects("hf config", name)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    bad = (0, -1, True, 1.5, "8", [8], {}, None)
    for i, key in enumerate(sizes):
        for value in (bad[i], bad[(i + 3) % len(bad)], 2**63):
            if (key, value) != ("max_position_embeddings", 2**63):
                yield Case("hf config", f"{key} is {value!r}", fields(name, **{key: value}))
        if key != "max_position_embeddings":
            yield Case("hf config", f"{key} is 2**40", fields(name, **{key: 2**40}))
        yield Case("hf config", f"{key} has 400 digits", spelled(name, key, "9" * 400))
    for key, text in (
        ("rms_norm_eps", "1e400"),
        ("rms_norm_eps", "NaN"),
        ("rms_norm_eps", '"\\ud800"'),
        ("rope_theta", "-Infinity"),
        ("rope_theta", "1e400"),
        ("head_dim", "7"),
        ("head_dim", "1099511627776"),
        ("num_key_value_heads", "3"),
        ("num_key_value_heads", "[]"),
        ("intermediate_size", "{}"),
        ("intermediate_size", "9223372036854775808"),
        ("model_type", "[]"),
        ("model_type", '"' + "x" * 100_000 + '"'),
        ("model_type", '"\\u001b[2J"'),
        ("model_type", '"gpt2"'),
        ("hidden_act", '{"a": 1}'),
        ("hidden_act", '"' + "x" * 100_000 + '"'),
        ("attention_bias", "1"),
        ("rope_scaling", '"linear"'),
        ("rope_scaling", '{"type": "llama3"}'),
        ("rope_scaling", '{"type": []}'),
        ("rope_scaling", '{"rope_type": "llama3", "factor": "8", "low_freq_factor": 1, "high_freq_factor": 4, '
         '"original_max_position_embeddings": 8}'),
        ("rope_parameters", "[1]"),
        ("tie_word_embeddings", '"yes"'),
        ("tie_word_embeddings", "[]"),
        ("eos_token_id", '"a"'),
        ("eos_token_id", "-1"),
        ("eos_token_id", "1e400"),
        ("eos_token_id", "[[1]]"),
        ("eos_token_id", '{"a": 1}'),
        ("eos_token_id", "99999"),
        ("eos_token_id", str(2**63)),
        ("quantization_config", '{"a": 1}'),
    ):  # fmt: skip
        without = fields("hf/tokenizer_config.json", eos_token=...)  # so that eos_token_id is read
        yield Case("hf config", f"{key} is {text[:30]}", both(without, spelled(name, key, text)))
    twice = spelled(name, "vocab_size", '"x", "vocab_size": 400')
    yield Case("hf config", "a key twice, the last one right", twice, legal=True)
    bom = lambda d: (d / name).write_bytes(b"\xef\xbb\xbf" + (d / name).read_bytes())  # noqa: E731
    yield Case("hf config", "a BOM", bom)
    yield Case("hf config", "a context of 2**40", fields(name, max_position_embeddings=2**40))
    yield Case("hf config", "a context of 2**30", fields(name, max_position_embeddings=2**30), legal=True)


def lit_config() -> Iterator[Case]:
    name = "base/lit_config.json"
    yield from no_objects("lit_config", name)
    for key, value in (
        ("arch", "mamba"), ("arch", []), ("arch", None), ("arch", "gpt2"), ("vocab_size", 2**40), ("vocab_size", 399),
        ("vocab_size", "400"), ("n_layer", 2**40), ("n_layer", 1000), ("n_layer", 2), ("n_embd", 2**63),
        ("n_embd", 10**30), ("n_head", 0), ("n_head", 2**40), ("n_kv_head", 3), ("head_size", 7), ("head_size", 2**40),
        ("block_size", 0), ("block_size", "x"), ("block_size", 1), ("norm_eps", "x"), ("norm_eps", -1), ("tie", "x"),
        ("tie", None), ("bias", 1), ("n_embd", 2**62), ("n_hidden", 2**30),
        ("qk_norm", True), ("qkv_bias", True), ("window", 0),
        ("window", 1.5), ("no_rope_every", -1), ("rope_scaling", {}), ("rope_scaling", []), ("rope_scaling", "x"),
        ("rope_scaling", {"factor": 1}), ("unknown", 1), ("unknown" * 1000, 1), ("\x1b[2J", 1), ("n_embd", ...),
        ("fingerprint", ...),
    ):  # fmt: skip
        shown = "left away" if value is ... else repr(value)
        yield Case("lit_config", f"{key[:20]!r} is {shown}", fields(name, **{key: value}))
    for text in ("NaN", "1e400", "1e-400", "-1"):
        yield Case("lit_config", f"rope_base is {text}", spelled(name, "rope_base", text))
    yield Case("lit_config", "a fingerprint that is a list", fields(name, fingerprint=[1]), legal=True)
    yield Case("lit_config", "a context of 2**40", fields(name, block_size=2**40))
    yield Case("lit_config", "a context of 2**30", fields(name, block_size=2**30), legal=True)
    yield Case("lit_config", "tied, though there is a head", fields(name, tie=True), legal=True)
    yield Case("lit_config", "a window of 10**30", fields(name, window=10**30), legal=True)
    yield Case("lit_config", "a key twice, the last one right", spelled(name, "n_layer", '9, "n_layer": 1'), legal=True)


# ------------------------------------------------------------------------------------------------------- tokenizers


def in_tokenizer(name: str, change: Callable[[dict], Any]) -> Make:
    def make(d: Path) -> None:
        content = json.loads((d / name).read_text())
        change(content)
        (d / name).write_text(json.dumps(content))

    return make


def tokenizer() -> Iterator[Case]:
    for kind, folder in (("tokenizer", "base"), ("hf tokenizer", "hf")):
        name, stated = f"{folder}/tokenizer.json", f"{folder}/tokenizer_config.json"
        say = lambda what, make, kind=kind, **options: Case(kind, what, make, **options)  # noqa: E731
        # a converter reads tokenizer.json for the end-of-text token that tokenizer_config.json does not name
        first = fields(stated, eos_token=...) if folder == "hf" else lambda d: None
        for case in no_objects(kind, name):
            if not (folder == "hf" and case.what.endswith(("a folder", "without end"))):  # as if it were not there
                case.make = both(first, case.make)
                yield case
        for what, change in {
            "no model": lambda t: t.pop("model"),
            "an unknown model": lambda t: t["model"].update(type="Magic"),
            "a vocabulary that is a list": lambda t: t["model"].update(vocab=["a"]),
            "a negative id": lambda t: t["model"]["vocab"].update(zzz=-1),
            "an id of 2**63": lambda t: t["model"]["vocab"].update(zzz=2**63),
            "a merge of no tokens": lambda t: t["model"]["merges"].append(["qqq", "zzz"]),
            "a merge of three": lambda t: t["model"]["merges"].append(["a", "b", "c"]),
            "a merge that is text": lambda t: t["model"]["merges"].append("abc"),
            "added tokens that are text": lambda t: t.update(added_tokens="x"),
            "an added token of number -1": lambda t: t["added_tokens"][0].update(id=-1),
            "an expression that is none": lambda t: t.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
            ),
            "a normalizer of rubbish": lambda t: t.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
            ),
            "an unknown decoder": lambda t: t.update(decoder={"type": "Magic"}),
        }.items():
            yield say(f"{name}: {what}", both(first, in_tokenizer(name, change)))
        pointer = "a pointer of Git LFS"
        yield from (case for case in no_objects(kind, stated) if not case.what.endswith(("a folder", "end", pointer)))
    name, stated = "base/tokenizer.json", "base/tokenizer_config.json"
    far = {"id": 99999, "content": "The", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    far |= {"normalized": False}
    catastrophe = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    for what, make in {
        "an id behind the network's vocabulary": in_tokenizer(name, lambda t: t["model"]["vocab"].update(T=400)),
        "no end of text": fields(stated, eos_token=...),
        "an end of text that is no token": fields(stated, eos_token="nothing"),
        "an end of text that is a number": fields(stated, eos_token=1),
        "an end of text that is a list": fields(stated, eos_token=["<eos>"]),
        "an end of text without content": fields(stated, eos_token={"a": 1}),
        "an end of text with a number in it": fields(stated, eos_token={"content": 5}),
        "an end of text of half a character": fields(stated, eos_token="\ud800"),
        "a beginning that is a list": fields(stated, bos_token=[1]),
        "no tokenizer": lambda d: (d / name).unlink(),
        "a chat template that is a number": fields(stated, chat_template=5),
        "chat templates that are numbers": fields(stated, chat_template=[1, 2]),
        "chat templates without text": fields(stated, chat_template=[{"name": "default"}]),
        "a chat template of NUL bytes and Latin-1": put("base/chat_template.jinja", b"\xe9\0"),
        "a chat template in UTF-16": put("base/chat_template.jinja", "{{ messages }}".encode("utf-16")),
    }.items():
        yield Case("tokenizer", what, make)
    slow = in_tokenizer(name, lambda t: t.update(pre_tokenizer=catastrophe))
    yield Case("tokenizer", "an expression that tries without end", slow, False, ("--prompt", "x" * 40))
    odd = fields(stated, add_bos_token="perhaps", x={"y": [None]})
    yield Case("tokenizer", "fields of other types that nothing reads", odd, legal=True)
    yield Case("tokenizer", "a key twice", spelled(stated, "eos_token", '"x", "eos_token": "<eos>"'), legal=True)


def proto(change: Callable[[Any], Any]) -> Make:
    def make(d: Path) -> None:
        content = spm.ModelProto.FromString((d / "sp/tokenizer.model").read_bytes())
        change(content)
        (d / "sp/tokenizer.model").write_bytes(content.SerializePartialToString())

    return make


def sentencepiece() -> Iterator[Case]:
    name = "sp/tokenizer.model"
    for what, make in {
        "nothing": put(name, b""),
        "text": put(name, "hello"),
        "NUL bytes": put(name, b"\0" * 100),
        "a pointer of Git LFS": put(name, POINTER),
        "tiktoken's": put(name, b"IQ== 0\nIg== 1\n"),
        "half of it": cut(name, 1000),
        "a length of 2**63": put(name, b"\x0a" + b"\xff" * 9 + b"\x01"),
        "a folder": folder_for(name),
        "no pieces": proto(lambda p: p.ClearField("pieces")),
        "a piece twice": proto(lambda p: p.pieces.append(p.pieces[-1])),
        "an empty piece": proto(lambda p: p.pieces.add(piece="", score=0.0)),
        "no end of text": proto(lambda p: setattr(p.pieces[2], "piece", "x")),
        "a table of characters that is none": proto(lambda p: p.normalizer_spec.MergeFromString(b"\x12\x02xx")),
    }.items():  # fmt: skip
        yield Case("sentencepiece", what, make)
    more = proto(lambda p: [p.pieces.add(piece=f"q{i}", score=0.0) for i in range(900)])
    yield Case("sentencepiece", "more pieces than the network has", more, legal=True)
    unknown = proto(lambda p: setattr(p.pieces[0], "type", 1))
    yield Case("sentencepiece", "no unknown piece", unknown, legal=True)
    broken = put("sp/tokenizer_config.json", '{"add_bos_token": [1]}')
    yield Case("sentencepiece", "add_bos_token that is a list", broken, legal=True)


TEMPLATES = {
    "the class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals of a function": "{{ raise_exception.__globals__['__builtins__']['open']('it-ran', 'w') }}",
    "the class through a filter": "{{ (''|attr('__class__')).x }}",
    "the class through format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir('it-ran') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.mkdir('it-ran') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('it-ran') }}",
    "an include": "{% include '/etc/hostname' %}",
    "an import": "{% import 'os' as os %}{{ os.mkdir('it-ran') }}",
    "a base": "{% extends '../base/tokenizer.json' %}",
    "a loop in a loop in a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a range of 10**12": "{% for a in range(10**12) %}{% endfor %}",
    "a long range": "{% for a in range(1000000000000) %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a text of 10**12 letters": "{{ 'x' * 1000000000000 }}",
    "a text of 10**9 letters": "{{ ('x' * 1000000000)|length }}",
    "a text that is padded": "{{ '%1000000000d' % 1 }}",
    "a text in the middle": "{{ 'x'|center(4000000000) }}",
    "lists in lists": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "squares": "{% set ns = namespace(x=99999) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a macro that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a change of messages": "{{ messages.append(1) }}",
    "no template": "{% if %}",
    "no end": "{% for m in messages %}",
    "an unknown filter": "{{ messages|magic }}",
    "an unknown name": "{{ nothing.at.all }}",
    "a number as text": "{{ messages + 1 }}",
    "division by zero": "{{ 1 / 0 }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "a refusal": "{{ raise_exception('no\nway\x1b[2J') }}",
    "a long refusal": "{{ raise_exception('x' * 1000000) }}",
    "a time of rubbish": "{{ strftime_now(5) }}",
    "JSON of a function": "{{ range|tojson }}",
    "a dictionary of itself": "{% set d = {} %}{{ d.update(a=d) }}{{ d|tojson }}",
    "half a character": "{{ '\\ud800' }}",
}


def chat_template() -> Iterator[Case]:
    for what, text in TEMPLATES.items():
        yield Case("chat template", what, put("base/chat_template.jinja", text))
    long = put("base/chat_template.jinja", "{# " + "x" * 10**7 + " #}{{ messages[0].content }}")
    yield Case("chat template", "a comment of 10 MB", long, legal=True)


# ------------------------------------------------------------------------------------------------------------- YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
YAMLS = {
    "a call of Python": "!!python/object/apply:os.mkdir [it-ran]",
    "a call of Python as a value": "train:\n  lr: !!python/object/apply:os.mkdir [it-ran]",
    "an object of Python": "data: !!python/object/new:os.system [mkdir it-ran]",
    "a name of Python": "data: !!python/name:os.system ''",
    "a module of Python": "data: !!python/module:antigravity ''",
    "an unknown tag": "data: !magic 1",
    "a class to make": "train:\n  class_path: os.mkdir\n  init_args: {path: it-ran}",
    "a class of the folder to make": "train:\n  class_path: evil.Thing",
    "a class of the folder as a method": "lora:\n  class_path: evil.Thing\n  init_args: {}",
    "billion laughs": LAUGHS,
    "billion laughs as a value": LAUGHS + "train:\n  lr: *j\n",
    "an alias of itself": "train: &a\n  lr: *a\n",
    "a list of itself": "data: &a [*a]",
    "an alias of nothing": "data: *nothing",
    "tabs": "train:\n\tlr: 1",
    "no end": "train: {lr: 1",
    "quotes without end": 'data: "abc',
    "a list": "[1, 2]",
    "a text": "hello",
    "a number": "1",
    "two documents": "data: a\n---\ndata: b\n",
    "UTF-16": "data: data.json\n".encode("utf-16"),
    "UTF-16 without a mark": "train: {lr: 1}".encode("utf-16-le"),
    "Latin-1": "data: é".encode("latin-1"),
    "NUL bytes": b"data: a\0b\n",
    "random bytes": bytes(range(128, 256)),
    "deep lists": "data: " + "[" * DEEP,
    "deep lists, closed": "data: " + "[" * 2000 + "]" * 2000,
    "deep objects": "{a: " * 5000 + "1" + "}" * 5000,
    "a list as a key": "? [1, 2]\n: 3\n",
    "an object as a key": "? {a: 1}\n: 3\n",
    "a number as a key": "1: 2\n",
    "a number of 5,000 digits": "train: {lr: " + "9" * 5000 + "}",
    "a number of 5,000 digits, whole": "train: {batch_size: " + "9" * 5000 + "}",
    "a rate that is no number": "train: {lr: .nan}",
    "a batch of 1e400": "train: {batch_size: 1e400}",
    "a date": "train: {lr: 2020-01-01}",
    "a date that is none": "train: {lr: 2020-99-99}",
    "an unknown option": "train: {rate: 1}",
    "an option of a class": "train: {__class__: 1}",
    "a list for a group": "train: [1]",
    "a text for a group": "train: hello",
    "a number for a path": "data: [1]",
    "a file of options for a group": "train: /etc/hostname",
    "another config": "config: c.yaml",
    "a merge of itself": "train: &a {<<: *a}",
    "base64": "data: !!binary '!!!'",
    "an escape of the terminal": '"\\e[2J": 1',
}


def yamls() -> Iterator[Case]:
    evil = put("evil.py", f"import os\nos.mkdir({MARKER!r})\n")
    for what, text in YAMLS.items():
        more = () if "data:" in str(text) else ("--data", "data.json")
        yield Case("config yaml", what, both(evil, put("c.yaml", text)), more=more)
    yield Case("config yaml", "a folder", folder_for("c.yaml"))
    for what, text in {
        "a BOM": b"\xef\xbb\xbfdata: data.json\n",
        "a key twice": "data: nothing\ndata: data.json\n",
    }.items():
        yield Case("config yaml", what, put("c.yaml", text), legal=True)
    for what in ("a call of Python", "deep lists", "deep lists, closed", "deep objects", "Latin-1", "NUL bytes",
                 "random bytes", "a list", "a text", "a number", "no end", "a list as a key",
                 "a number of 5,000 digits", "two documents", "an alias of nothing", "a merge of itself",
                 "a date that is none", "base64"):  # fmt: skip
        yield Case("hparams", what, put("run/hparams.yaml", YAMLS[what]))
    for what, text in {
        "nothing": "",
        "a style that is a list": "prompt: {style: [1]}",
        "a prompt that is a text": "prompt: hello",
        "no prompt": "train: {}",
        "a style without an instruction": "prompt: {style: abc}",
    }.items():
        yield Case("hparams", what, put("run/hparams.yaml", text))
    yield Case("hparams", "none", lambda d: (d / "run/hparams.yaml").unlink())
    yield Case("hparams", "a folder", folder_for("run/hparams.yaml"))
    yield Case("hparams", "billion laughs", put("run/hparams.yaml", LAUGHS + "prompt: {style: alpaca}\n"))
    odd = put("run/hparams.yaml", "prompt: {style: alpaca, x: [.nan]}\nprompt: {style: '{instruction}'}\n")
    yield Case("hparams", "a key twice, and others", odd, legal=True)


# ------------------------------------------------------------------------------------------------------------- data

ROW = {"instruction": "a", "output": "b"}
PAIR = '{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}'


def data() -> Iterator[Case]:
    def say(what: str, name: str, content: bytes | str, legal: bool = False, make: Make | None = None) -> Case:
        return Case("data", f"{name}: {what}", make or put(name, content), legal, ("--data", name))

    for what, content in NO_OBJECTS.items():
        if what != "a pointer of Git LFS":
            yield say(what, "d.json", content)
            if what not in ("a number of 5,000 digits",):
                yield say(what, "d.jsonl", content)
    for name in ("d.json", "d.jsonl", "d.csv", "d.txt"):
        yield say("a pointer of Git LFS", name, POINTER)
        yield say("a folder", name, "", make=folder_for(name))
        yield say("a device without end", name, "", make=link(name, "/dev/zero"))
        yield say("a picture", name, b"\x89PNG\r\n\x1a\n\0\0\xff")
        if name in ("d.csv", "d.txt"):
            for what in ("nothing", "spaces", "UTF-16", "Latin-1", "NUL bytes", "random bytes"):
                yield say(what, name, NO_OBJECTS[what])
    yield say("no data", "none.json", "", make=lambda d: None)
    yield say("of another ending", "d.parquet", b"PAR1\0\0")

    def message(**fields_of: Any) -> str:
        return json.dumps([{"messages": [{"role": "user", "content": "a"}, fields_of]}] * 2)

    answer = dict(role="assistant", content="b")
    for what, content in {
        "an empty list": "[]",
        "a row that is null": "[null]",
        "a row that is a number": "[1]",
        "a row that is a list": "[[1]]",
        "a row that is empty": "[{}]",
        "a row without output": '[{"instruction": "a"}]',
        "a second row of another kind": '[{"instruction": "a", "output": "b"}, {"text": "c"}]',
        "a text that is a list": '[{"instruction": ["a"], "output": "b"}]',
        "a text that is an object": '[{"instruction": {"a": 1}, "output": "b"}]',
        "a text that is a deep list": '[{"instruction": ' + "[" * 900 + "]" * 900 + ', "output": "b"}]',
        "half a character": '[{"instruction": "\\ud800", "output": "b"}]',
        "half a character in a name": '[{"instruction": "a", "output": "b"}, {"\\ud800": "b"}]',
        "a row with a number of 5,000 digits": '[{"instruction": ' + "9" * 5000 + ', "output": "b"}]',
        "outputs that are empty": json.dumps([{"instruction": str(i), "output": ""} for i in range(9)]),
        "a NUL byte, escaped in the output's name": '[{"instruction": "a", "outp\\u0000ut": "b"}]',
        "one row": '[{"instruction": "a", "output": ""}]',
        "messages that are a number": '[{"messages": 5}]',
        "messages that are empty": '[{"messages": []}]',
        "messages in messages": json.dumps([{"messages": [{"messages": [answer]}]}]),
        "messages in a list": json.dumps([{"messages": [[answer]]}]),
        "a role that is a list": message(role=["assistant"], content="b"),
        "an unknown role": message(role="system2", content="b"),
        "a role of 100,000 letters": message(role="x" * 100_000, content="b"),
        "a role that moves the cursor": message(role="\x1b[2J", content="b"),
        "content that is null": message(role="assistant", content=None),
        "content of parts": message(role="assistant", content=[{"type": "text", "text": "b"}]),
        "content of half a character": message(role="assistant", content="\udc00"),
        "an assistant that says nothing": message(role="user", content="b"),
        "a label that is a list": '[{"text": "a", "label": ["b"]}, {"text": "c", "label": "d"}]',
        "a label that is empty": '[{"text": "a", "label": " "}, {"text": "c", "label": "d"}]',
        "one label": '[{"text": "a", "label": "b"}, {"text": "c", "label": "b"}]',
        "a conversation of numbers": '[{"conversations": [1, 2]}]',
        "a comma too many": f"[{PAIR},]",
        "single quotes": "[{'instruction': 'a', 'output': 'b'}]",
        "keys of 100,000 letters": json.dumps([{"x" * 100_000: 1}]),
        "100,000 keys": json.dumps([{str(i): 1 for i in range(100_000)}]),
        "two lists": f"[{PAIR}] [{PAIR}]",
    }.items():
        yield say(what, "d.json", content)
    for what, content in {
        "a key twice": '[{"instruction": "x", "instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]',
        "a BOM": "\ufeff[" + PAIR + "]",
        "NaN and 1e400 as texts": '[{"instruction": NaN, "output": 1e400}, {"instruction": -Infinity, "output": 2}]',
        "fields beside": '[{"instruction": "a", "output": "b", "x": [[{}]]}, {"instruction": "c", "output": "d"}]',
        "a row of 10 MB": json.dumps([{"instruction": "a", "output": "stone " * 1_700_000}, ROW]),
        "controls": json.dumps([{"instruction": "\x1b[2J\u202e", "output": "\x07\ufffe"}, ROW]),
        "a NUL byte, escaped": '[{"instruction": "a\\u0000", "output": "b"}, {"instruction": "c", "output": "d"}]',
    }.items():
        yield say(what, "d.json", content, legal=True)
    line = json.dumps(ROW)
    for what, content in {
        "a broken line": line + '\n{"instruction": \n',
        "a list of rows": f"[\n{line},\n{line}\n]",
        "commas": f"{line},\n{line}\n",
        "a line of 10 MB that ends nowhere": line + '\n{"instruction": "' + "x" * 10**7,
        "a deep line": line + "\n" + "[" * DEEP,
        "a line with a number of 5,000 digits": line + "\n" + "9" * 5000,
    }.items():
        yield say(what, "d.jsonl", content)
    yield say("ends of Macs", "d.jsonl", (line + "\r") * 3, legal=True)
    yield say("ends of Windows, and empty lines", "d.jsonl", f"{line}\r\n\r\n{line.replace('a', 'c')}\r\n", legal=True)
    yield say("a BOM", "d.jsonl", f"\ufeff{line}\n{line.replace('a', 'c')}", legal=True)
    for what, content in {
        "names alone": "instruction,output\n",
        "other names": "question,answer\na,b\n",
        "no names": "a,b\nc,d\n",
        "a field too many": "instruction,output\na,b,c\n",
        "a field too few": "instruction,output\na\nb\n",
        "quotes without end": 'instruction,output\n"a,b\nc,d\n',
        "quotes without end, 10 MB": 'instruction,output\n"' + "a," * 5_000_000,
        "semicolons": "instruction;output\na;b\n",
        "tabs": "instruction\toutput\na\tb\n",
        "a name twice": "output,output\na,b\n",
        "100,000 names": ",".join(map(str, range(100_000))) + "\na\n",
        "empty outputs": "instruction,output\na,\nb,\n",
        "one label": "text,label\na,b\nc,b\n",
        "an empty label": "text,label\na,\nc,b\n",
        "a name that moves the cursor": "\x1b[2J,b\na,b\n",
    }.items():
        yield say(what, "d.csv", content)
    yield say("a BOM", "d.csv", "\ufeffinstruction,output\na,b\nc,d\n", legal=True)
    yield say("lines in quotes", "d.csv", 'instruction,output\n"a\n\nb","c\r\nd"\nc,d\n', legal=True)
    yield say("a field of 10 MB", "d.csv", f'instruction,output\na,"{"stone " * 1_700_000}"\nc,d\n', legal=True)
    yield say("ends of Macs", "d.csv", "instruction,output\ra,b\rc,d\r", legal=True)
    yield say("a line of 10 MB", "d.txt", "x" * 10**7, legal=True)
    yield say("a BOM", "d.txt", "\ufeff" + "stone river\n" * 999, legal=True)


# ------------------------------------------------------------------------------------------------------------- GGUF

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
PACKED = {U8: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}


def g_string(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def g(kind: int, value: Any) -> bytes:
    """A typed value of GGUF."""
    return struct.pack("<I", kind) + g_plain(kind, value)


def g_plain(kind: int, value: Any) -> bytes:
    return g_string(value) if kind == STRING else struct.pack(PACKED[kind], value)


def g_list(kind: int, values: list, n: int | None = None) -> bytes:
    plain = b"".join(g_plain(kind, value) for value in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values) if n is None else n) + plain


def gguf_file(
    fields_of: dict[str, bytes] | None = None,
    tensors: dict[str, dict] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_fields: int | None = None,
    twice: bool = False,
) -> bytes:
    """A GGUF file of a llama of SMALL's sizes. `fields_of` (None: left away) and `tensors` change it; a tensor is
    dict(dims, kind, offset, data)."""
    c = model.Config(**SMALL)
    tokens = [f"t{i}" for i in range(c.vocab_size)]
    tokens[:3] = "<unk>", "<s>", "</s>"
    made = {
        "general.architecture": g(STRING, "llama"),
        "llama.context_length": g(U32, c.block_size),
        "llama.embedding_length": g(U32, c.n_embd),
        "llama.block_count": g(U32, c.n_layer),
        "llama.feed_forward_length": g(U32, c.n_hidden),
        "llama.attention.head_count": g(U32, c.n_head),
        "llama.attention.head_count_kv": g(U32, c.n_kv_head),
        "llama.attention.layer_norm_rms_epsilon": g(F32, 1e-5),
        "tokenizer.ggml.model": g(STRING, "llama"),
        "tokenizer.ggml.tokens": g_list(STRING, tokens),
        "tokenizer.ggml.scores": g_list(F32, [-float(i) for i in range(len(tokens))]),
        "tokenizer.ggml.token_type": g_list(I32, [2, 3, 3] + [1] * (len(tokens) - 3)),
        "tokenizer.ggml.unknown_token_id": g(U32, 0),
        "tokenizer.ggml.bos_token_id": g(U32, 1),
        "tokenizer.ggml.eos_token_id": g(U32, 2),
    }
    made = {name: value for name, value in (made | (fields_of or {})).items() if value is not None}
    E, Q, KV, F = c.n_embd, c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_hidden
    shapes = {"token_embd": (E, 400), "output": (E, 400), "output_norm": (E,), "blk.0.attn_norm": (E,)}
    shapes |= {"blk.0.ffn_norm": (E,), "blk.0.attn_q": (E, Q), "blk.0.attn_k": (E, KV), "blk.0.attn_v": (E, KV)}
    shapes |= {"blk.0.attn_output": (Q, E), "blk.0.ffn_gate": (E, F), "blk.0.ffn_up": (E, F), "blk.0.ffn_down": (F, E)}
    infos, end = {}, 0
    for stem, dims in shapes.items():
        n = 4 * int(torch.tensor(dims).prod())
        infos[f"{stem}.weight"] = dict(dims=dims, kind=0, offset=end)
        end += n
    for name, changes in (tensors or {}).items():
        if changes is None:
            del infos[name]
        else:
            infos[name] = infos.get(name, dict(dims=(E,), kind=0, offset=0)) | changes
    head = magic + struct.pack("<I", version)
    head += struct.pack("<QQ", len(infos) if n_tensors is None else n_tensors,
                        (len(made) + twice) if n_fields is None else n_fields)  # fmt: skip
    items = [*made.items()] + ([*made.items()][:1] if twice else [])
    head += b"".join(g_string(name) + value for name, value in items)
    for name, info in infos.items():
        dims = info["dims"]
        head += g_string(name) + struct.pack("<I", info.get("n_dims", len(dims)))
        head += b"".join(struct.pack("<Q", n) for n in dims) + struct.pack("<IQ", info["kind"], info["offset"])
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + b"\0" * end


def gguf() -> Iterator[Case]:
    say = lambda what, *args, **options: Case("gguf", what, put("m.gguf", gguf_file(*args, **options)))  # noqa: E731
    for what, content in {
        "nothing": b"",
        "three bytes": b"GGU",
        "the magic alone": b"GGUF",
        "24 bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        "text": b"hello, this is no model",
        "a pointer of Git LFS": POINTER.encode(),
        "NUL bytes": b"\0" * 4096,
        "a zip file": b"PK\x03\x04" + b"\0" * 100,
    }.items():
        yield Case("gguf", what, put("m.gguf", content))
    yield Case("gguf", "a folder", folder_for("m.gguf"))
    yield Case("gguf", "none", lambda d: (d / "m.gguf").unlink())
    whole = gguf_file()
    for n in (30, 100, 1000, 5000, 20_000, len(whole) - 1):
        yield Case("gguf", f"its first {n} bytes", put("m.gguf", whole[:n]))
    yield say("another magic", magic=b"FUGG")
    for version in (0, 1, 4, 2**32 - 1, 3 << 24):
        yield say(f"version {version}", version=version)
    for n in (2**40, 2**63, 2**64 - 1):
        yield say(f"{n} fields", n_fields=n)
        yield say(f"{n} tensors", n_tensors=n)
    yield say("a field too few", n_fields=14)
    yield say("no tensors", n_tensors=0)
    yield say("a field twice", twice=True)
    for name in ("general.architecture", "llama.block_count", "llama.context_length", "tokenizer.ggml.tokens",
                 "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id",
                 "tokenizer.ggml.model"):  # fmt: skip
        yield say(f"no {name}", {name: None})
    for kind in (U8, U32, F32, STRING, ARRAY):
        for n in (2**40, 2**63):
            yield say(f"a list of {n} of type {kind}", {"x": g_list(kind, [], n)})
    yield say("a text of 2**63 bytes", {"x": struct.pack("<IQ", STRING, 2**63)})
    yield say("a text of 2**40 bytes", {"x": struct.pack("<IQ", STRING, 2**40)})
    yield say("a field of an unknown type", {"x": struct.pack("<IQ", 99, 1)})
    yield say("a list of an unknown type", {"x": struct.pack("<IIQ", ARRAY, 99, 1)})
    yield say("lists in lists", {"x": struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000})
    many = struct.pack("<IIQ", ARRAY, U8, 10**7) + b"\0" * 10**7
    yield Case("gguf", "a list of 10**7 bytes, and all are there", put("m.gguf", gguf_file({"x": many})), legal=True)
    texts = g_list(STRING, [""] * 800_000)
    yield Case("gguf", "800,000 texts without letters", put("m.gguf", gguf_file({"x": texts})), legal=True)
    lists = struct.pack("<IIQ", ARRAY, ARRAY, 100_000) + struct.pack("<IQ", U8, 0) * 100_000
    yield say("100,000 lists in a list", {"x": lists})
    bpe = {"tokenizer.ggml.model": g(STRING, "gpt2"), "tokenizer.ggml.pre": g(STRING, "gpt-2")}
    for what, changes in {
        "an unknown architecture": {"general.architecture": g(STRING, "mamba")},
        "an architecture that is a number": {"general.architecture": g(U32, 1)},
        "an architecture that is a list": {"general.architecture": g_list(STRING, ["llama"])},
        "an architecture of half a character": {"general.architecture": g(STRING, b"\xff\xfe")},
        "10**9 layers": {"llama.block_count": g(U32, 10**9)},
        "2**63 layers": {"llama.block_count": g(U64, 2**63)},
        "two layers": {"llama.block_count": g(U32, 2)},
        "no layers": {"llama.block_count": g(U32, 0)},
        "layers that are text": {"llama.block_count": g(STRING, "1")},
        "a width of 2**63": {"llama.embedding_length": g(U64, 2**63)},
        "a width of 2**40": {"llama.embedding_length": g(U64, 2**40)},
        "a list of widths": {"llama.feed_forward_length": g_list(U32, [32, 32])},
        "no heads": {"llama.attention.head_count": g(U32, 0)},
        "5 heads": {"llama.attention.head_count": g(U32, 5)},
        "eps that is no number": {"llama.attention.layer_norm_rms_epsilon": g(F32, float("nan"))},
        "eps that is text": {"llama.attention.layer_norm_rms_epsilon": g(STRING, "x")},
        "a scaling of rope": {"llama.rope.scaling.type": g(STRING, "yarn")},
        "a base of rope without end": {"llama.rope.freq_base": g(F32, float("inf"))},
        "an unknown tokenizer": {"tokenizer.ggml.model": g(STRING, "bert")},
        "a tokenizer that is a list": {"tokenizer.ggml.model": g_list(STRING, ["llama"])},
        "tokens that are numbers": {"tokenizer.ggml.tokens": g_list(U32, [1] * 400)},
        "tokens that are one text": {"tokenizer.ggml.tokens": g(STRING, "abc")},
        "tokens that are no text": {"tokenizer.ggml.tokens": g_list(STRING, [b"\xff"] * 400)},
        "fewer scores than tokens": {"tokenizer.ggml.scores": g_list(F32, [0.0])},
        "scores that are texts": {"tokenizer.ggml.scores": g_list(STRING, ["a"] * 400)},
        "kinds of tokens that there are not": {"tokenizer.ggml.token_type": g_list(I32, [77] * 400)},
        "an end of text that is no token": {"tokenizer.ggml.eos_token_id": g(U32, 4000)},
        "a negative end of text": {"tokenizer.ggml.eos_token_id": g(I32, -401)},
        "an end of text that is text": {"tokenizer.ggml.eos_token_id": g(STRING, "x")},
        "a beginning of 2**63": {"tokenizer.ggml.bos_token_id": g(U64, 2**63)},
        "an unknown token of 2**63": {"tokenizer.ggml.unknown_token_id": g(U64, 2**63)},
        "a space that is text": {"tokenizer.ggml.add_space_prefix": g(STRING, "x")},
        "byte-level without merges": bpe,
        "byte-level by an unknown rule": bpe | {"tokenizer.ggml.pre": g(STRING, "x")},
        "merges of no tokens": bpe | {"tokenizer.ggml.merges": g_list(STRING, ["a b"])},
        "merges of one": bpe | {"tokenizer.ggml.merges": g_list(STRING, ["a"])},
        "an alignment of 0": {"general.alignment": g(U32, 0)},
        "an alignment of 3": {"general.alignment": g(U32, 3)},
        "an alignment of 2**31": {"general.alignment": g(U32, 2**31)},
        "an alignment that is text": {"general.alignment": g(STRING, "x")},
        "a name of no text": {"x": g(U32, 1), "\x1b[2J": g(U32, 99)},
    }.items():  # fmt: skip
        legal = what in ("a name of no text",)
        yield Case("gguf", what, put("m.gguf", gguf_file(changes)), legal)
    norm = "output_norm.weight"
    for what, changes in {
        "a tensor too few": {norm: None},
        "no embeddings": {"token_embd.weight": None},
        "a tensor too many": {"x.weight": {}},
        "a tensor with a name of 10,000 letters": {"x" * 10_000: {}},
        "a shape of 2**40": {norm: dict(dims=(2**40,))},
        "a shape of 2**63": {norm: dict(dims=(2**63,))},
        "a shape of 2**32 by 2**32": {norm: dict(dims=(2**32, 2**32))},
        "a shape of 2**62 by 4 by 8": {norm: dict(dims=(2**62, 4, 8))},
        "a shape with 0": {norm: dict(dims=(0,))},
        "a shape of nothing": {norm: dict(dims=())},
        "2**32 - 1 dimensions": {norm: dict(n_dims=2**32 - 1)},
        "100 dimensions": {norm: dict(dims=(1,) * 100)},
        "an offset of 2**40": {norm: dict(offset=2**40)},
        "an offset of 2**63": {norm: dict(offset=2**63)},
        "an offset of 2**64 - 32": {norm: dict(offset=2**64 - 32)},
        "an unknown type": {norm: dict(kind=99)},
        "a type that went": {norm: dict(kind=4)},
        "a type of blocks in a row too short": {norm: dict(kind=12)},
        "whole numbers": {norm: dict(kind=26)},
        "an embedding of one dimension": {"token_embd.weight": dict(dims=(12800,))},
        "embeddings of 2**40 tokens": {"token_embd.weight": dict(dims=(32, 2**40))},
        "500 in one place": {f"blk.{i}.ffn_up.weight": dict(dims=(32, 32)) for i in range(500)},
        "a frequency too few": {"rope_freqs.weight": dict(dims=(1,))},
        "frequencies of zero": {"rope_freqs.weight": dict(dims=(4,))},
        "frequencies of 2**62": {"rope_freqs.weight": dict(dims=(2**62,))},
    }.items():
        yield Case("gguf", what, put("m.gguf", gguf_file(tensors=changes)))
    yield Case("gguf", "as it should be", lambda d: None, legal=True)


# ---------------------------------------------------------------------------------- output folders with traps in them


def output() -> Iterator[Case]:
    def planted(name: str, to: str = "../outside/secret") -> Make:
        return both(lambda d: (d / "new").mkdir(), lambda d: (d / "new" / name).symlink_to(to))

    aside = f".{os.getpid()}.partial"
    for name in ("lit_model.safetensors", "lit_config.json", "tokenizer.json", "tokenizer_config.json"):
        yield Case("output", f"a link {name}", planted(name))
        yield Case("output", f"a link {name} to nothing", planted(name, "../outside/nothing"))
        yield Case("output", f"a link {name} where it is written", planted(name + aside), legal=True)
    yield Case("output", "a file in its place", put("new", "x"))
    yield Case("output", "a link to nothing in its place", lambda d: (d / "new").symlink_to("outside/nothing/at/all"))


MAKERS = (gguf, checkpoint, method, hf_safetensors, hf_bin, hf_index, hf_config, lit_config, tokenizer, sentencepiece)
MAKERS += (meta, chat_template, yamls, data, output)
CASES = [case for maker in MAKERS for case in maker()]
