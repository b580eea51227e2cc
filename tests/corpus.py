"""Hostile files: a small valid file of each kind, and the changes that are made to it.

`valid(folder, tiny)` writes the valid files once. A `Case` changes a copy of one of them, and the script of its kind
reads it: see READERS. What is True in `refused` must end in an error; anything else may also be read.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf as gguf_package
import torch
from conftest import LLAMA, WORDS, randomize
from safetensors.torch import load_file, save_file
from test_convert import bpe_fields, meta_folder, sentencepiece, write_gguf

from finetune import lora as lora_script
from generate import base as generate_base
from lit_model.load import save_method
from lit_model.methods import lora
from lit_model.model import GPT, Config
from lit_model.weights.folder import Folder, save_folder, tokenizer_files
from scripts import convert

Change = Callable[[Path], object]  # of the file of this path


class Case(NamedTuple):
    file: str
    what: str
    change: Change
    refused: bool = True


GENERATE = "--device cpu --max_new_tokens 2 --temperature 0 --checkpoint_dir"
READERS = {  # folder or file: script and options
    "base": (generate_base, f"{GENERATE} base"),
    "bin": (generate_base, f"{GENERATE} bin"),
    "shards": (generate_base, f"{GENERATE} shards"),
    "sp": (generate_base, f"{GENERATE} sp"),
    "chat": (generate_base, f"{GENERATE} chat --style chat"),
    "run": (generate_base, f"{GENERATE} base --method_dir run"),
    "m.gguf": (convert, "--src m.gguf --out_dir new"),
    "meta": (convert, "--src meta --out_dir new --block_size 64"),
    "c.yaml": (lora_script, "--config c.yaml --checkpoint_dir base --data data.json --out_dir new"),
}
MARKER = "it-ran"  # the code of a hostile file would make this file


def valid(folder: Path, tiny: Path) -> None:
    """Writes one valid file, or folder, of each kind."""
    shape = {**LLAMA, "vocab_size": 400, "block_size": 64, "n_layer": 2, "n_embd": 32, "n_hidden": 32}
    gpt = randomize(GPT(Config(**shape)), 0.1)
    tokenizer = tokenizer_files(tiny / "base")
    sentencepiece(folder, 300)
    pieces = {"tokenizer.model": (folder / "sp.model").read_bytes()}
    for name, files in (("base", tokenizer), ("sp", pieces), ("chat", tokenizer)):
        save_folder(folder / name, gpt.config, gpt.state_dict(), files)
    (folder / "chat/chat_template.jinja").write_text("{{ messages[0].content }}")
    for name in ("bin", "shards"):
        shutil.copytree(folder / "base", folder / name)
        (folder / name / "model.safetensors").unlink()
    tensors = load_file(folder / "base/model.safetensors")
    torch.save(tensors, folder / "bin/pytorch_model.bin")
    torch.save(tensors, folder / "shards/one.bin")
    index = dict(weight_map=dict.fromkeys(tensors, "one.bin"))
    (folder / "shards/pytorch_model.bin.index.json").write_text(json.dumps(index))
    gpt.requires_grad_(False)
    meta_folder(folder / "meta", gpt, 1, True, pieces)
    write_gguf(folder / "m.gguf", gpt, bpe_fields(tiny))
    lora.install(gpt, lora.LoRA())
    (folder / "run").mkdir()
    save_method(folder / "run/lit_method.safetensors", gpt, "lora", lora.LoRA(), Folder(folder / "base").identity)
    (folder / "run/hparams.yaml").write_text("examples:\n  style: '{instruction}'\n")
    (folder / "data.json").write_text(json.dumps([dict(instruction=a, output=b) for a, b in zip(WORDS, WORDS[1:])]))
    (folder / "c.yaml").write_text("train:\n  max_steps: 1\n")


# ------------------------------------------------------------------------------------------------------ any of the files


def put(content: bytes | str) -> Change:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(share: float) -> Change:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(seed: int) -> Change:
    """Changes up to four bytes, most often near the beginning."""

    def change(path: Path) -> None:
        rng, content = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content) if rng.random() < 0.3 else min(len(content), 600))] = rng.randrange(256)
        path.write_bytes(content)

    return change


def in_place(make: Change) -> Change:
    return lambda path: (path.unlink(), make(path))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
DEEP = 100_000
DAMAGES = {
    "nothing": put(b""),
    "a pointer of Git LFS": put(POINTER),
    "NUL bytes": put(b"\0" * 4096),
    "bytes that are no text": put(bytes(range(128, 256))),
    "half of it": cut(0.5),
    "nearly all of it": cut(0.99),
    "a folder": in_place(Path.mkdir),
    "a device without end": in_place(lambda path: path.symlink_to("/dev/zero")),
}
NO_OBJECTS = {
    "a list": b"[1, 2]",
    "null": b"null",
    "half an object": b'{"a": 1, ',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deeply nested lists": b"[" * DEEP + b"]" * DEEP,
    "deeply nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}
WEIGHTS = ["base/model.safetensors", "bin/pytorch_model.bin", "shards/one.bin", "run/lit_method.safetensors"]
WEIGHTS += ["meta/consolidated.00.pth", "m.gguf"]
OBJECTS = ["base/config.json", "base/tokenizer.json", "base/tokenizer_config.json", "meta/params.json"]
OBJECTS += ["shards/pytorch_model.bin.index.json"]


def damaged() -> Iterator[Case]:
    for file in (*WEIGHTS, *OBJECTS, "sp/tokenizer.model", "meta/tokenizer.model", "run/hparams.yaml"):
        for what, change in DAMAGES.items():
            yield Case(file, what, change, refused=file in WEIGHTS)
        for seed in range(16):
            yield Case(file, f"flipped bytes {seed}", flip(seed), refused=False)
    for file in OBJECTS:
        yield from (Case(file, what, put(content)) for what, content in NO_OBJECTS.items())


# -------------------------------------------------------------------------------------------------------------- weights


def in_header(change: Callable[[dict], Any]) -> Change:
    """Changes the header of a safetensors file."""

    def changed(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return changed


def in_tensors(change: Callable[[dict], Any]) -> Change:
    def changed(path: Path) -> None:
        tensors = {name: t.clone() for name, t in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return changed


def safetensors() -> Iterator[Case]:
    file, norm = "base/model.safetensors", "model.norm.weight"
    for n in (2**40, 2**63, 2**64 - 1):
        yield Case(file, f"a header of {n} bytes", put(struct.pack("<Q", n) + b"{}"))
    yield Case(file, "a header of deep objects", put(struct.pack("<Q", 5 * DEEP) + b'{"a":' * DEEP))
    for changes in (dict(shape=[2**40, 2**40]), dict(shape=[-1, 4]), dict(data_offsets=[2**40, 2**41]),
                    dict(data_offsets=[100, 0]), dict(dtype="F37"), dict(dtype="F64")):  # fmt: skip
        yield Case(file, f"an entry with {changes}", in_header(lambda h, changes=changes: h[norm].update(changes)))
    yield Case(file, "two tensors in one place", in_header(lambda h: h.update(x=h[norm])))
    yield Case(file, "a tensor too few", in_tensors(lambda t: t.pop(norm)))
    yield Case(file, "a tensor too many", in_tensors(lambda t: t.update({"\x1b[2J" + "x" * 9000: torch.zeros(1)})))
    yield Case(file, "weights that are no numbers", in_tensors(lambda t: t.update({norm: t[norm] * torch.nan})))
    for kind in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        change = in_tensors(lambda t, kind=kind: t.update({norm: t[norm].to(kind)}))
        yield Case(file, f"weights of {kind}", change)
    file = "run/lit_method.safetensors"
    say = lambda **changes: in_header(lambda h: h["__metadata__"].update(changes))  # noqa: E731
    for changes in (dict(method="os.system"), dict(method="prefix"), dict(base="0"), dict(options="{"),
                    dict(options="[" * DEEP), dict(options='{"r": 1099511627776}'), dict(options='{"r": -1}'),
                    dict(options='{"targets": "("}'), dict(options='{"x": 1}'), dict(task="[1]"),
                    dict(task='{"classes": 5, "head": "linear"}'),
                    dict(method="prompt", options='{"length": 1099511627776}')):  # fmt: skip
        yield Case(file, f"a header with {str(changes)[:80]}", say(**changes))


class Reduces:
    """Unpickled without care, it makes a folder."""

    def __init__(self, call: Callable, *args: Any):
        self.reduced = call, args

    def __reduce__(self) -> tuple:
        return self.reduced


class Lies:
    """A tensor of 4 numbers that says it is of another shape."""

    def __init__(self, *shape: int):
        self.shape = shape

    def __reduce__(self) -> tuple:
        storage, stride = torch.zeros(4)._typed_storage(), (1,) * len(self.shape)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, stride, False, OrderedDict())


def rezipped(change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Change:
    """Changes the members of a zip file; None omits one."""

    def changed(path: Path) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
            for member in old.namelist():
                if (content := change(member, old.read(member))) is not None:
                    new.writestr(member, content)
        path.write_bytes(buffer.getvalue())

    return changed


def pickles() -> Iterator[Case]:
    saved = lambda content, **options: lambda path: torch.save(content, path, **options)  # noqa: E731
    more = lambda **tensors: lambda path: torch.save(torch.load(path) | tensors, path)  # noqa: E731
    runs, old = Reduces(os.mkdir, MARKER), dict(_use_new_zipfile_serialization=False)
    for file, norm in (("bin/pytorch_model.bin", "model.norm.weight"), ("meta/consolidated.00.pth", "norm.weight")):
        for what, change in {
            "a pickle that runs code": put(pickle.dumps({"a": runs}, 2)),
            "a zip file that runs code": saved({norm: runs}),
            "a zip file that runs eval": saved({norm: Reduces(eval, f"__import__('os').mkdir('{MARKER}')")}),
            "code in the place of a name": saved({runs: torch.zeros(1)}),
            "the old format that runs code": saved({norm: runs}, **old),
            "a list": saved([torch.zeros(2)]),
            "numbers by name": saved({norm: 1}),
            "tensors by number": saved({1: torch.zeros(1)}),
            "another shape": more(**{norm: torch.zeros(3)}),
            "a sparse tensor": more(**{norm: torch.zeros(32).to_sparse()}),
            "a tensor expanded to 2**40": more(**{norm: torch.zeros(1).expand(2**40)}),
            "a tensor of int64": more(**{norm: torch.zeros(32, dtype=torch.int64)}),
            "a tensor on the meta device": more(**{norm: torch.zeros(32, device="meta")}),
            "a nested one": more(**{norm: {"a": torch.zeros(32)}}),
            "4 numbers that are 2**40": more(**{norm: Lies(2**40)}),
            "4 numbers that are 2**62 by 2, the old format": saved({norm: Lies(2**62, 2)}, **old),
            "a zip bomb": rezipped(lambda m, c: c if m.endswith(".pkl") else b"\0" * 10**7, zipfile.ZIP_DEFLATED),
            "no data": rezipped(lambda m, c: None if "/data/" in m else c),
            "short data": rezipped(lambda m, c: c[:5] if "/data/" in m else c),
        }.items():
            yield Case(file, what, change)
    file = "shards/pytorch_model.bin.index.json"
    for shard in ("../secret", "/etc/hostname", "sub/one.bin", ".", "..", "", "a\0b", "\ud800", "x" * 9000, "two.bin",
                  "config.json", 5):  # fmt: skip
        yield Case(file, f"the shard {str(shard)[:20]!r}", fields(weight_map={"model.norm.weight": shard}))
    yield from (Case(file, f"the map {x!r}", fields(weight_map=x)) for x in (["one.bin"], {}, {"x": {"y": 1}}))


# ---------------------------------------------------------------------------------------------------------------- JSON


def fields(**changes: Any) -> Change:
    """Changes fields of a JSON object; those that become ... are omitted."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return change


def objects() -> Iterator[Case]:
    wrong = (0, -1, 1.5, "8", [8], {}, True, None, 2**40, 2**63, 10**400, float("nan"), float("inf"))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                 "rms_norm_eps", "num_key_value_heads", "head_dim", "rope_theta"):  # fmt: skip
        for value in wrong:
            legal = value is None and name in ("num_key_value_heads", "head_dim", "rope_theta")
            legal |= name in ("rope_theta", "rms_norm_eps") and value in (1.5, 2**40)  # other numbers, no errors
            legal |= name == "rope_theta" and value in (0, {}) or name == "max_position_embeddings" and value == 2**63
            yield Case("base/config.json", f"{name} is {str(value)[:20]}", fields(**{name: value}), not legal)
    for name, value in (("model_type", []), ("model_type", "\x1b[2J" + "x" * DEEP), ("model_type", "gpt2"),
                        ("hidden_act", {"a": 1}), ("attention_bias", 1), ("rope_scaling", "linear"),
                        ("rope_scaling", {"rope_type": "llama3"}), ("rope_parameters", [1]), ("vocab_size", ...),
                        ("tie_word_embeddings", "yes"), ("quantization_config", {"a": 1}),
                        ("quantization_config", [1])):  # fmt: skip
        yield Case("base/config.json", f"{name} is {str(value)[:20]}", fields(**{name: value}))
    for name, value in (("dim", ...), ("dim", 2**40), ("dim", "32"), ("n_layers", 10**9), ("n_layers", 1),
                        ("n_heads", 3), ("n_heads", True), ("vocab_size", "400"), ("vocab_size", 2**40),
                        ("norm_eps", float("nan")), ("rope_theta", [1])):  # fmt: skip
        yield Case("meta/params.json", f"{name} is {str(value)[:20]}", fields(**{name: value}))
    yield Case("meta/consolidated.00.pth", "a slice of another number", lambda p: p.rename(p.with_stem("consolidated.01")))
    for value in (..., "nothing", 1, ["<eos>"], {"a": 1}, {"content": 5}, "\ud800"):
        yield Case("base/tokenizer_config.json", f"eos_token is {value!r}", fields(eos_token=value))
    for value in (5, [1, 2], [{"name": "default"}]):
        yield Case("base/tokenizer_config.json", f"chat_template is {value!r}", fields(chat_template=value))
    regex = lambda text: fields(  # noqa: E731
        pre_tokenizer={"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
    )
    yield Case("base/tokenizer.json", "an expression that is none", regex("("))
    yield Case("base/tokenizer.json", "rubbish as normalizer", fields(normalizer={"type": "Precompiled"}))
    yield Case("base/tokenizer.json", "added tokens that are text", fields(added_tokens="x"))


# ---------------------------------------------------------------------------------------------------------------- GGUF

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(n_tensors: int, n_fields: int, rest: bytes = b"", version: int = 3) -> Change:
    return put(b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + rest)


def gguf() -> Iterator[Case]:
    for n in (2**40, 2**63, 2**64 - 1):
        yield Case("m.gguf", f"{n} fields", header(0, n))
        yield Case("m.gguf", f"{n} tensors", header(n, 0))
        yield Case("m.gguf", f"a text of {n} bytes", header(0, 1, text("x") + struct.pack("<IQ", STRING, n)))
        for kind in (U32, STRING, ARRAY):
            rest = text("x") + struct.pack("<IIQ", ARRAY, kind, n)
            yield Case("m.gguf", f"a list of {n} of type {kind}", header(0, 1, rest))
        shape = text("x") + struct.pack("<IQQIQ", 2, n, 4, 0, 0)
        yield Case("m.gguf", f"a tensor of {n} by 4", header(1, 0, shape))
    deep = text("x") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * DEEP
    yield Case("m.gguf", "lists in lists", header(0, 1, deep))
    yield Case("m.gguf", "100,000 tensors in one place", header(DEEP, 0, b"".join(
        text(f"{i}") + struct.pack("<IQIQ", 1, 32, 0, 0) for i in range(DEEP))))  # fmt: skip
    yield Case("m.gguf", "version 1", header(0, 0, version=1))
    yield Case("m.gguf", "its fields alone", lambda path: path.write_bytes(path.read_bytes()[: 9 * 1024]))
    for name, value in {
        "general.architecture": "mamba",
        "general.alignment": 0,
        "llama.block_count": 10**9,
        "llama.embedding_length": 2**31,
        "llama.attention.head_count": 0,
        "llama.attention.layer_norm_rms_epsilon": "x",
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "x",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.token_type": [1],
        "tokenizer.ggml.merges": ["a b c"],
        "tokenizer.ggml.eos_token_id": 4000,
        "tokenizer.ggml.bos_token_id": 2**31,
        "tokenizer.chat_template": 1,
    }.items():
        legal = name == "tokenizer.chat_template"
        yield Case("m.gguf", f"{name} is {value!r}", lambda path, n=name, v=value: rewritten(path, n, v), not legal)


def rewritten(path: Path, name: str, value: Any) -> None:
    """Writes the file again with another value of a field."""
    reader = gguf_package.GGUFReader(path)
    writer = gguf_package.GGUFWriter(path.with_suffix(".new"), None)
    contents = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    for key, content in (contents | {name: value}).items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array,
               float: writer.add_float32}[type(content)]  # fmt: skip
        add(key, content)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


# -------------------------------------------------------------------------------------------------- YAML and templates

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
YAMLS = [
    "!!python/object/apply:os.mkdir [it-ran]", "train:\n  lr: !!python/object/apply:os.mkdir [it-ran]",
    "data: !!python/object/new:os.system [mkdir it-ran]", "data: !!python/module:antigravity ''", "data: !magic 1",
    "train:\n  class_path: os.mkdir\n  init_args: {path: it-ran}", "lora:\n  class_path: evil.Thing\n  init_args: {}",
    LAUGHS, LAUGHS + "train:\n  lr: *j\n", "train: &a\n  lr: *a\n", "data: &a [*a]", "train: &a {<<: *a}",
    "train:\n\tlr: 1", "train: {lr: 1", "[1, 2]", "hello", "1", "data: a\n---\ndata: b\n", "data: " + "[" * DEEP,
    "data: " + "[" * 2000 + "]" * 2000, "{a: " * 5000 + "1" + "}" * 5000, "? [1, 2]\n: 3\n", "1: 2\n",
    "train: {lr: " + "9" * 5000 + "}", "train: {lr: .nan}", "train: {batch_size: 1e400}", "train: {lr: 2020-99-99}",
    "train: {__class__: 1}", "train: [1]", "train: /etc/hostname", "config: c.yaml", "data: !!binary '!!!'",
    '"\\e[2J": 1',
]  # fmt: skip
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ (''|attr('__class__')).x }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('it-ran', 'w') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.mkdir('it-ran') }}", "{{ lipsum.__globals__['os'].mkdir('it-ran') }}",
    "{% include '/etc/hostname' %}", "{% import 'os' as os %}{{ os.mkdir('it-ran') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ range(10000000000)|list }}",
    "{{ 9 ** 9 ** 9 }}", "{{ 'x' * 1000000000000 }}", "{{ ('x' * 1000000000)|length }}",
    "{% set ns = namespace(x=99999) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages.append(1) }}", "{% if %}", "{{ messages|magic }}",
    "{{ 1 / 0 }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ raise_exception('no\nway\x1b[2J' * 9999) }}", "{{ strftime_now(5) }}", "{{ range|tojson }}",
]  # fmt: skip


def texts() -> Iterator[Case]:
    yield from (Case("c.yaml", f"YAML {i}: {content[:40]!r}", put(content)) for i, content in enumerate(YAMLS))
    for i, content in enumerate(TEMPLATES):
        yield Case("chat/chat_template.jinja", f"template {i}: {content[:40]!r}", put(content))


CASES = [case for cases in (damaged, safetensors, pickles, objects, gguf, texts) for case in cases()]
