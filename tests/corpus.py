"""Hostile files: a small valid file of each kind, and the changes that are made to it.

`valid(folder, tiny)` writes the valid files once. A `Case` changes a copy of one, and the script of its kind reads it,
see READERS. Where `refused` is True it must end in an error; any other may also be read.
"""

import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import LLAMA, WORDS, randomize
from safetensors.torch import load_file, save_file
from test_convert import bpe_fields, sentencepiece, write_gguf

from finetune import lora as lora_script
from generate import base as generate_base
from lit_model.load import save_method
from lit_model.methods import lora
from lit_model.model import GPT, Config
from lit_model.weights.folder import Folder, save_folder, tokenizer_files
from scripts import convert


class Case(NamedTuple):
    file: str
    what: str
    change: Callable[..., object]  # of the path and of `args`
    args: Sequence[Any] = ()
    refused: bool = True


GENERATE = "--device cpu --max_new_tokens 2 --temperature 0 --checkpoint_dir"
TRAIN = "--checkpoint_dir base --data data.json --out_dir new --devices cpu --dry_run"
READERS = {  # folder or file: script and options
    "base": (generate_base, f"{GENERATE} base"),
    "bin": (generate_base, f"{GENERATE} bin"),
    "shards": (generate_base, f"{GENERATE} shards"),
    "sp": (generate_base, f"{GENERATE} sp"),
    "chat": (generate_base, f"{GENERATE} chat --style chat"),
    "run": (generate_base, f"{GENERATE} base --method_dir run"),
    "m.gguf": (convert, "--src m.gguf --out_dir new"),
    "c.yaml": (lora_script, f"{TRAIN} --config c.yaml"),
    "data.json": (lora_script, f"{TRAIN} --examples.style {{instruction}} --examples.val_fraction 0"),
}
MARKER = "it-ran"  # the code of a hostile file would make this folder


def valid(folder: Path, tiny: Path) -> None:
    """Writes one valid file, or folder, of each kind."""
    shape = {**LLAMA, "vocab_size": 400, "block_size": 64, "n_layer": 2, "n_embd": 32, "n_hidden": 32}
    gpt = randomize(GPT(Config(**shape)), 0.1)
    sentencepiece(folder, 300)
    tokenizer, pieces = tokenizer_files(tiny / "base"), {"tokenizer.model": (folder / "sp.model").read_bytes()}
    for name, files in (("base", tokenizer), ("sp", pieces), ("chat", tokenizer)):
        save_folder(folder / name, gpt.config, gpt.state_dict(), files)
    (folder / "chat/chat_template.jinja").write_text("{{ messages[0].content }}")
    tensors = load_file(folder / "base/model.safetensors")
    for name, file in (("bin", "pytorch_model.bin"), ("shards", "one.bin")):
        shutil.copytree(folder / "base", folder / name)
        (folder / name / "model.safetensors").unlink()
        torch.save(tensors, folder / name / file)
    index = dict(weight_map=dict.fromkeys(tensors, "one.bin"))
    (folder / "shards/pytorch_model.bin.index.json").write_text(json.dumps(index))
    write_gguf(folder / "m.gguf", gpt, bpe_fields(tiny))
    gpt.requires_grad_(False)
    lora.install(gpt, lora.LoRA())
    (folder / "run").mkdir()
    save_method(folder / "run/lit_method.safetensors", gpt, "lora", lora.LoRA(), Folder(folder / "base").identity)
    (folder / "run/hparams.yaml").write_text("examples:\n  style: '{instruction}'\n")
    (folder / "data.json").write_text(json.dumps([dict(instruction=a, output=b) for a, b in zip(WORDS, WORDS[1:])]))
    (folder / "c.yaml").write_text("examples: {style: '{instruction}', val_fraction: 0}\n")


def put(path: Path, content: bytes | str) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path, seed: int) -> None:
    """Changes up to four bytes, most often near the beginning."""
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content) if rng.random() < 0.3 else min(len(content), 600))] = rng.randrange(256)
    path.write_bytes(content)


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DEEP = 100_000
DAMAGES = {
    "nothing": (put, b""),
    "a pointer of Git LFS": (put, "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64),
    "bytes that are no text": (put, bytes(range(128, 256))),
    "half of it": (cut, 0.5),
    "nearly all of it": (cut, 0.99),
    "a folder": (instead, Path.mkdir),
    "a device without end": (instead, lambda path: path.symlink_to("/dev/zero")),
    **{f"flipped bytes {seed}": (flip, seed) for seed in range(5)},
}
NO_OBJECTS = {
    "a list": b"[1, 2]",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deeply nested lists": b"[" * DEEP + b"]" * DEEP,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}
DAMAGED = """base/model.safetensors bin/pytorch_model.bin shards/one.bin run/lit_method.safetensors m.gguf
base/config.json base/tokenizer.json base/tokenizer_config.json shards/pytorch_model.bin.index.json
sp/tokenizer.model run/hparams.yaml data.json""".split()


def damaged() -> Iterator[Case]:
    for file in DAMAGED:
        is_weights = file.endswith((".safetensors", ".bin", ".gguf"))
        for what, (change, *args) in DAMAGES.items():
            yield Case(file, what, change, args, refused=is_weights and change is not flip)
        if file.endswith(".json"):
            yield from (Case(file, what, put, [content]) for what, content in NO_OBJECTS.items())


def in_header(path: Path, part: str, changes: dict[str, Any]) -> None:
    """Changes an entry in the header of a safetensors file."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header[part] = header.get(part, header["__metadata__"]) | changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def save(path: Path, content: Any, zipped: bool = True) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def with_tensor(path: Path, name: str, t: Any) -> None:
    """Puts a tensor into a file, or in the place of another."""
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in load_file(path).items()} | {name: t}, path)
    else:
        torch.save(torch.load(path) | {name: t}, path)


def safetensors() -> Iterator[Case]:
    file, norm = "base/model.safetensors", "model.norm.weight"
    for n in (2**40, 2**63, 2**64 - 1):
        yield Case(file, f"a header of {n} bytes", put, [struct.pack("<Q", n) + b"{}"])
    yield Case(file, "a header of deep objects", put, [struct.pack("<Q", 5 * DEEP) + b'{"a":' * DEEP])
    for changes in (dict(shape=[2**40, 2**40]), dict(shape=[-1, 4]), dict(data_offsets=[2**40, 2**41]),
                    dict(data_offsets=[100, 0]), dict(data_offsets=[0, 128]), dict(dtype="F37")):  # fmt: skip
        yield Case(file, f"an entry with {changes}", in_header, [norm, changes])
    yield Case(file, "a tensor too many", with_tensor, ["\x1b[2J" + "x" * 9000, torch.zeros(1)])
    for kind in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        yield Case(file, f"weights of {kind}", with_tensor, [norm, torch.ones(32).to(kind)])
    for changes in (dict(method="os.system"), dict(method="prefix"), dict(base="0"), dict(options="[" * DEEP),
                    dict(options='{"r": 1099511627776}'), dict(options='{"r": -1}'), dict(options='{"x": 1}'),
                    dict(options='{"targets": "("}'), dict(task="[1]"), dict(task='{"classes": 5, "head": "linear"}'),
                    dict(method="prompt", options='{"length": 1099511627776}')):  # fmt: skip
        yield Case("run/lit_method.safetensors", f"a header with {changes}"[:80], in_header, ["__metadata__", changes])


class Reduces:
    """Unpickled without care, it calls a function."""

    def __init__(self, call: Callable, *args: Any):
        self.reduced = call, args

    def __reduce__(self) -> tuple:
        return self.reduced


def lie(*shape: int) -> Reduces:
    """A tensor of 4 numbers that says it is of another shape."""
    storage = torch.zeros(4)._typed_storage()
    return Reduces(torch._utils._rebuild_tensor_v2, storage, 0, shape, (1,) * len(shape), False, {})


def pickles() -> Iterator[Case]:
    runs = Reduces(os.mkdir, MARKER)
    file, norm = "bin/pytorch_model.bin", "model.norm.weight"
    for what, (change, *args) in {
        "a pickle that runs code": (put, pickle.dumps({"a": runs}, 2)),
        "a zip file that runs code": (save, {norm: runs}),
        "a zip file that runs eval": (save, {norm: Reduces(eval, f"__import__('os').mkdir('{MARKER}')")}),
        "code in the place of a name": (save, {runs: torch.zeros(1)}),
        "the old format that runs code": (save, {norm: runs}, False),
        "a list": (save, [torch.zeros(2)]),
        "numbers by name": (save, {norm: 1}),
        "tensors by number": (save, {1: torch.zeros(1)}),
        "another shape": (with_tensor, norm, torch.zeros(3)),
        "a sparse tensor": (with_tensor, norm, torch.zeros(32).to_sparse()),
        "a tensor expanded to 2**40": (with_tensor, norm, torch.zeros(1).expand(2**40)),
        "a tensor of int64": (with_tensor, norm, torch.zeros(32, dtype=torch.int64)),
        "a tensor on the meta device": (with_tensor, norm, torch.zeros(32, device="meta")),
        "4 numbers that are 2**40": (with_tensor, norm, lie(2**40)),
        "4 numbers that are 2**62 by 2, the old format": (save, {norm: lie(2**62, 2)}, False),
    }.items():
        yield Case(file, what, change, args)
    file = "shards/pytorch_model.bin.index.json"
    for shard in ("../secret", "/etc/hostname", "sub/one.bin", ".", "..", "", "a\0b", "\ud800", "two.bin", 5):
        yield Case(file, f"the shard {shard!r}", fields, [{"weight_map": {"model.norm.weight": shard}}])


def fields(path: Path, changes: dict[str, Any]) -> None:
    """Changes fields of a JSON object; those that become ... are omitted."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


FIELDS = {
    "base/config.json": dict(
        **dict.fromkeys(
            ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            (0, "8", True, 3, 10**9, 2**40, 10**400),
        ),
        max_position_embeddings=(..., 0, 1.5, "8", 2**40), head_dim=(7, 2**30, {}), attention_bias=(1,),
        rms_norm_eps=("x", float("nan"), float("inf")), rope_theta=(-1, "x", [1]), rope_parameters=([1],),
        rope_scaling=("linear", {"rope_type": "llama3"}, {"rope_type": []}), hidden_act=({"a": 1}, "gelu"),
        model_type=([], "\x1b[2J" + "x" * DEEP, "gpt2"), tie_word_embeddings=("yes",),
        quantization_config=({"a": 1}, [1]),
    ),
    "base/tokenizer_config.json": dict(eos_token=(..., "nothing", 1, ["<eos>"], {"a": 1}, {"content": 5}, "\ud800")),
    "base/tokenizer.json": dict(
        pre_tokenizer=({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},),
        normalizer=({"type": "Precompiled"},), added_tokens=("x",), model=({}, {"type": "BPE", "vocab": ["a"]}),
    ),
    "shards/pytorch_model.bin.index.json": dict(weight_map=(["one.bin"], {}, {"x": {"y": 1}})),
}  # fmt: skip


def objects() -> Iterator[Case]:
    for what, more in (("tied", {}), ("tied, 10**9 layers", dict(num_hidden_layers=10**9))):
        yield Case("base/config.json", what, fields, [dict(tie_word_embeddings=True) | more], refused=bool(more))
    for file, names in FIELDS.items():
        for name, values in names.items():
            yield from (Case(file, f"{name} is {str(x)[:20]}", fields, [{name: x}]) for x in values)


U32, F32, STRING, ARRAY = 4, 6, 8, 9  # kinds of values in a GGUF file


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_header(path: Path, n_tensors: int, n_fields: int, rest: bytes = b"", version: int = 3) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + rest)


def in_gguf(path: Path, name: str, value: bytes) -> None:
    """Another value of a field, as long as its own."""
    where = re.compile(re.escape(text(name)) + b"....(" + b"." * len(value) + b")", re.DOTALL)
    content = path.read_bytes()
    begin, end = where.search(content).span(1)
    path.write_bytes(content[:begin] + value + content[end:])


def gguf() -> Iterator[Case]:
    for n in (2**40, 2**63, 2**64 - 1):
        for what, args in {
            "fields": (0, n),
            "tensors": (n, 0),
            "bytes of a text": (0, 1, text("x") + struct.pack("<IQ", STRING, n)),
            "numbers in a list": (0, 1, text("x") + struct.pack("<IIQ", ARRAY, U32, n)),
            "texts in a list": (0, 1, text("x") + struct.pack("<IIQ", ARRAY, STRING, n)),
            "lists in a list": (0, 1, text("x") + struct.pack("<IIQ", ARRAY, ARRAY, n)),
            "rows of a tensor": (1, 0, text("x") + struct.pack("<IQQIQ", 2, n, 4, 0, 0)),
        }.items():
            yield Case("m.gguf", f"{n} {what}", gguf_header, args)
    deep = text("x") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * DEEP
    yield Case("m.gguf", "deep lists", gguf_header, (0, 1, deep))
    infos = (text(f"{i}") + struct.pack("<IQIQ", 1, 32, 0, 0) for i in range(DEEP))
    yield Case("m.gguf", "100,000 tensors in one place", gguf_header, (DEEP, 0, b"".join(infos)))
    yield Case("m.gguf", "version 1", gguf_header, (0, 0, b"", 1))
    sizes = ("llama.block_count", "llama.embedding_length", "llama.attention.head_count", "tokenizer.ggml.eos_token_id")
    for name, values in {
        "general.architecture": [text("mamba")],
        "tokenizer.ggml.model": [text("bert")],
        "tokenizer.ggml.pre": [text("gpt-9")],
        **dict.fromkeys(sizes, [struct.pack("<I", n) for n in (555, 10**9, 2**32 - 1)]),
        "llama.attention.layer_norm_rms_epsilon": [struct.pack("<f", float("nan"))],
        "tokenizer.ggml.token_type": [struct.pack("<IQ", 99, 400), struct.pack("<IQ", F32, 2**62)],
    }.items():
        yield from (Case("m.gguf", f"{name} is {value}", in_gguf, (name, value)) for value in values)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
YAMLS = [
    "!!python/object/apply:os.mkdir [it-ran]", "train:\n  lr: !!python/object/apply:os.mkdir [it-ran]",
    "data: !!python/object/new:os.system [mkdir it-ran]", "data: !!python/module:antigravity ''", "data: !magic 1",
    "train:\n  class_path: os.mkdir\n  init_args: {path: it-ran}", "lora:\n  class_path: evil.Thing\n  init_args: {}",
    LAUGHS, LAUGHS + "train:\n  lr: *j\n", "train: &a\n  lr: *a\n", "data: &a [*a]", "train: &a {<<: *a}",
    "train:\n\tlr: 1", "train: {lr: 1", "[1, 2]", "hello", "data: a\n---\ndata: b\n", "data: " + "[" * DEEP,
    "data: " + "[" * 2000 + "]" * 2000, "{a: " * 5000 + "1" + "}" * 5000, "? [1, 2]\n: 3\n", "1: 2\n",
    "train: {lr: " + "9" * 5000 + "}", "train: {lr: .nan}", "train: {batch_size: 1e400}", "train: {lr: 2020-99-99}",
    "train: {__class__: 1}", "train: [1]", "train: /etc/hostname", "config: c.yaml", '"\\e[2J": 1',
]  # fmt: skip
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ (''|attr('__class__')).x }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('it-ran', 'w') }}", "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "{{ lipsum.__globals__['os'].mkdir('it-ran') }}",
    "{% include '/etc/hostname' %}", "{% import 'os' as os %}{{ os.mkdir('it-ran') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ range(10000000000)|list }}",
    "{{ 9 ** 9 ** 9 }}", "{{ 'x' * 1000000000000 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% set ns = namespace(x=99999) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ messages.append(1) }}", "{% if %}", "{{ messages|magic }}", "{{ 1 / 0 }}", "{{ range|tojson }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ raise_exception('no\nway\x1b[2J' * 9999) }}",
]  # fmt: skip


def texts() -> Iterator[Case]:
    for file, contents in (("c.yaml", YAMLS), ("chat/chat_template.jinja", TEMPLATES)):
        yield from (Case(file, f"{i}: {content[:40]!r}", put, [content]) for i, content in enumerate(contents))


CASES = [case for cases in (damaged, safetensors, pickles, objects, gguf, texts) for case in cases()]
