"""PEFT's adapter folders, adapter_config.json and adapter_model.safetensors: read as a method of ours, and written.

    LORA             lora; dora with use_dora; new tokens with trainable_token_indices; a head in modules_to_save
    PREFIX_TUNING    prefix         PROMPT_TUNING    prompt
    IA3              ia3            LN_TUNING        selective, its norms
    ADAPTION_PROMPT  adapter, with one linear gate for all heads of a layer: read only

Where transformers fuses layers (GPT-2's c_attn) a LoRA of ours on each of k of them is one of rank k r there: the As
one below the other, the Bs along the diagonal.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_model.data.tokenizer import Tokenizer
from lit_model.files import read_json, reading, refuse_used
from lit_model.methods import ia3
from lit_model.methods.adapter import Adapter
from lit_model.methods.dora import DoRA
from lit_model.methods.ia3 import IA3
from lit_model.methods.lora import LoRA
from lit_model.methods.prefix import Prefix
from lit_model.methods.prompt import Prompt
from lit_model.methods.selective import Selective
from lit_model.model import GPT
from lit_model.weights.folder import Folder, network_shapes, opened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = "token_adapter.trainable_tokens_delta"
Named = dict[str, Tensor]
Methods = Sequence[tuple[dict[str, Any], Named]]  # `load.read_method` of each folder; LoRAs among several add up


class Modules:
    """Their modules, without prefixes, beside ours."""

    def __init__(self, base: Folder):
        self.base, self.family = base, base.family
        self.n_out = {name.rpartition(".")[0]: shape[0] for name, shape in network_shapes(base.config).items()}
        self.n_out["lm_head"] = base.config.vocab_size
        self.ours: dict[str, list[str]] = {}  # theirs -> ours in it, one below the other
        for name in self.n_out:
            self.ours.setdefault(self.theirs(name), []).append(name)
        for i in range(base.config.n_layer):
            self.ours[self.theirs(f"blocks.{i}.attn.q_proj").rpartition(".")[0]] = [f"blocks.{i}.attn"]

    def theirs(self, name: str) -> str:
        """Their module that our module `name` lies in."""
        return self.family.stored(f"{name}.weight").removesuffix(".weight")

    def full(self, theirs: str) -> str:
        """Its name in PEFT's network."""
        return "base_model.model." + self.family.full_name(f"{theirs}.").removesuffix(".")

    def targets(self, chosen: Iterable[str]) -> list[str]:
        """The shortest names for PEFT that mean the modules `chosen`, and no others."""
        for n in (1, 2):
            ends = {".".join(name.split(".")[-n:]) for name in chosen}
            if {name for name in self.ours if name.endswith(tuple(ends))} == {*chosen}:
                return sorted(ends)
        return sorted(chosen)

    def split(self, theirs: str, t: Tensor) -> list[tuple[str, Tensor]]:
        """The rows of t that are of each of our modules in theirs."""
        names = self.ours[theirs]
        return list(zip(names, t.split([self.n_out[name] for name in names]), strict=True))


def read_peft(folder: Path, base: Folder) -> tuple[dict[str, Any], Named]:
    """What a method folder of ours would hold: its header, see load.py, and the tensors.

    Raises ValueError for what no method of ours is, or a tensor that has no place in this base.
    """
    path = folder / WEIGHTS
    with reading(folder / CONFIG):
        config = read_json(folder / CONFIG)
        kind = config["peft_type"]
        if kind not in READERS:
            raise ValueError(f"its peft_type is {kind!r}; known are {', '.join(READERS)}")
    with reading(path):
        stored = load_file(path) if path.is_file() else opened(path.with_suffix(".bin"))
        prefixes = rf"(_orig_mod\.|base_model\.model\.|{re.escape(base.family.prefix)}(?=.*\.))*"
        theirs = {re.sub(f"^{prefixes}", "", name.replace("._orig_mod.", ".")): t.float() for name, t in stored.items()}
        modules = Modules(base)
        tokens, rows = _take_tokens(config, theirs, modules)
        method, options, tensors = READERS[kind](config, theirs, modules)
        if theirs:
            raise ValueError(f"it has a tensor {min(theirs)}, which no method here has a place for")
    header = dict(method=method, options=asdict(options) if options else {}, base=base.identity, quantize="none")
    return header | dict(task=None, tokens=tokens), tensors | rows


def _take(theirs: Named, kind: str) -> Named:
    """Takes the tensors whose names end in `kind` out: their module -> tensor."""
    return {name.removesuffix(f".{kind}"): theirs.pop(name) for name in list(theirs) if name.endswith(f".{kind}")}


def _take_tokens(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[dict[str, int], Named]:
    """Trained tokens, text -> id, and their rows."""
    found, indices = _take(theirs, TOKENS), config.get("trainable_token_indices")
    if not found:
        return {}, {}
    base, tokenizer = modules.base, Tokenizer(modules.base.path)
    ids, *others = indices.values() if isinstance(indices, dict) else [indices]
    if any(other != ids for other in others):
        raise ValueError(f"trainable_token_indices are {indices!r:.80}; they must be the same in both layers")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rows = {f"{modules.ours[name][0]}.deltas.tokens.rows": t[order] for name, t in found.items()}
    if not base.config.tie:
        own = base.tensor("lm_head.weight")[sorted(ids)].float()
        rows = {"lm_head.deltas.tokens.rows": own} | rows
    return {str(tokenizer.hf.id_to_token(i)): i for i in sorted(ids)}, rows


def _read_lora(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, LoRA, Named]:
    method, kind = ("dora", DoRA) if config.get("use_dora") else ("lora", LoRA)
    As, Bs, sizes = (_take(theirs, f"lora_{end}") for end in ("A.weight", "B.weight", "magnitude_vector"))
    rslora, layers = bool(config.get("use_rslora")), {}
    for name, A in As.items():
        patterns, full = config.get("alpha_pattern") or {}, modules.family.full_name(name)
        own = (a for pattern, a in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", full))
        alpha = float(next(own, config["lora_alpha"]))
        for ours, B in modules.split(name, Bs.pop(name)):
            layers[ours] = A, B, alpha
    ranks, alphas = {len(A) for A, _, _ in layers.values()}, {alpha for _, _, alpha in layers.values()}
    r, is_one = max(ranks), len(ranks) == len(alphas) == 1
    tensors = {}
    for name, (A, B, alpha) in layers.items():
        if not is_one:
            A, B = _of_rank(r, A, B * LoRA(len(A), alpha, rslora=rslora).scale)
        tensors |= {f"{name}.deltas.{method}.A": A, f"{name}.deltas.{method}.B": B.contiguous()}
    for name, size in sizes.items():
        for ours, part in modules.split(name, size.flatten()):
            norms = modules.base.tensor(f"{ours}.weight").float().norm(dim=-1)
            tensors[f"{ours}.deltas.dora.magnitude"] = part - norms
    head = {name: theirs.pop(name) for name in list(theirs) if name == "lm_head.weight"}  # of modules_to_save
    alpha = alphas.pop() if is_one else float(r)
    theirs |= Bs
    options = kind(r, alpha, ",".join(layers), config.get("lora_dropout") or 0.0, rslora and is_one)
    return method, options, tensors | head


def _of_rank(r: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with zeros up to this rank."""
    return F.pad(A, (0, 0, 0, r - len(A))), F.pad(B, (0, r - len(A)))


def _read_virtual(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, Prefix | Prompt, Named]:
    t, shape = theirs.pop("prompt_embeddings"), modules.base.config  # (P, C), or (P, L 2 nkv hs)
    if config["peft_type"] == "PROMPT_TUNING":
        return "prompt", Prompt(len(t)), {"virtual_tokens.prompt.embedding": t}
    kv = t.view(len(t), shape.n_layer, 2, shape.n_kv_head, shape.head_size).permute(1, 2, 0, 3, 4)
    return "prefix", Prefix(len(t), "zero"), {"virtual_keys.prefix.kv": kv.contiguous()}


def _read_ia3(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, IA3, Named]:
    with torch.device("meta"):
        gpt = GPT(modules.base.config)
        ia3.install(gpt, IA3())
    tensors = {name: torch.ones(t.shape) for name, t in gpt.state_dict().items() if ".deltas." in name}
    for name, t in _take(theirs, "ia3_l").items():
        for ours, part in [(modules.ours[name][0], t[0])] if len(t) == 1 else modules.split(name, t[:, 0]):
            key = f"{ours}.deltas.ia3.scale"
            if key not in tensors:  # behind the activation of a gated MLP, before down_proj
                key = key.replace("mlp.down_proj", "mlp.up_proj")
            if key not in tensors and not part.eq(1).all():
                raise ValueError(f"it scales {ours}, which ia3 here does not")
            tensors |= {key: part} if key in tensors else {}
    return "ia3", IA3(), tensors


def _read_norms(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, Selective, Named]:
    found = {kind: _take(theirs, f"ln_tuning_layers.{kind}") for kind in ("weight", "bias")}
    tensors = {f"{modules.ours[name][0]}.{kind}": t for kind in found for name, t in found[kind].items()}
    return "selective", Selective("norms"), tensors


def _read_adapter(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, Adapter, Named]:
    tensors, shape = {}, modules.base.config
    prompts, gates = (_take(theirs, f"adaption_{kind}") for kind in ("prompt", "gate"))
    for name, prompt in prompts.items():
        start = f"{modules.ours[name][0]}.deltas.adapter."
        tensors |= {f"{start}prompt": prompt[0], f"{start}gate": gates.pop(name).expand(shape.n_head).clone()}
    options = Adapter(config["adapter_len"], shape.n_layer - len(prompts), "linear")
    return "adapter", options, tensors


READERS = dict(
    LORA=_read_lora, PREFIX_TUNING=_read_virtual, PROMPT_TUNING=_read_virtual, IA3=_read_ia3, LN_TUNING=_read_norms,
    ADAPTION_PROMPT=_read_adapter,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- out


def write_peft(out_dir: Path, methods: Methods, base: Folder, exact: bool = False) -> None:
    """Writes a method as a PEFT folder.

    Args:
        exact: a LoRA keeps alpha, rslora and DoRA's magnitudes, which PEFT reads; else its scale lies in B and alpha is
            its rank, so that all that read PEFT's LoRAs agree on it.
    Raises:
        ValueError: PEFT has no such method, or `out_dir` is in use.
    """
    (header, tensors), modules = methods[0], Modules(base)
    method = "lora" if len(methods) > 1 else header["method"]
    if header["task"] or method not in ("lora", "dora", *WRITERS):
        raise ValueError(f"peft cannot say {method}; merge it with --to hf, or serve it with --method_dir")
    if method in WRITERS:
        config, stored = WRITERS[method](tensors, modules)
    else:
        config, stored = _write_lora(methods, method, modules, exact)
    if header["tokens"]:
        config |= _write_tokens(header["tokens"], tensors, stored, modules)
    if "lm_head.weight" in tensors:
        config["modules_to_save"], stored["base_model.model.lm_head.weight"] = ["lm_head"], tensors["lm_head.weight"]
    common = dict(task_type="CAUSAL_LM", base_model_name_or_path=str(base.path), inference_mode=True)
    refuse_used(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in stored.items()}, out_dir / WEIGHTS, dict(format="pt"))
    (out_dir / CONFIG).write_text(json.dumps(common | config, indent=2, sort_keys=True) + "\n")


def plain_lora(methods: Methods, modules: Modules) -> dict[str, tuple[Tensor, Tensor]]:
    """`lora_layers` for formats that know nothing else. Raises ValueError if a method is more than a LoRA."""
    for header, tensors in methods:
        if header["method"] != "lora" or header["task"] or any(".deltas.lora." not in name for name in tensors):
            raise ValueError(f"{header['method']} is more than a LoRA: merge it with --to hf or --to gguf")
    return lora_layers(methods, modules)


def lora_layers(
    methods: Methods, modules: Modules, kind: str = "lora", exact: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Their module -> (A, scale * B) of all LoRAs on ours in it, all of one rank. Raises ValueError for experts'."""
    layers = {}
    for theirs, ours in modules.ours.items():
        As, Bs = [], []
        for header, tensors in methods:
            found = [tensors[key] for name in ours if (key := f"{name}.deltas.{kind}.A") in tensors]
            if found:
                blocks = [tensors.get(f"{name}.deltas.{kind}.B", torch.empty(modules.n_out[name], 0)) for name in ours]
                As += found
                Bs.append(torch.block_diag(*blocks) * LoRA(**header["options"]).scale)
        if As and "experts" in theirs:
            raise ValueError(f"a LoRA on {theirs} is read by nobody else; merge it with --to hf")
        if As:
            layers[theirs] = torch.cat(As), torch.cat(Bs, dim=1)
    ranks = {len(A) for A, _ in layers.values()}
    r, padded = max(ranks), ", lower ranks padded with zeros" if len(ranks) > 1 else ""
    if not exact:
        print(f"one LoRA of rank {r} on {len(layers)} modules{padded}; its scale is folded into B")
    return {name: _of_rank(r, *factors) for name, factors in layers.items()}


def _write_lora(methods: Methods, kind: str, modules: Modules, exact: bool) -> tuple[dict[str, Any], Named]:
    is_dora, is_sum, (header, tensors) = kind == "dora", len(methods) > 1, methods[0]
    if is_dora and not exact:
        raise ValueError("a DoRA is read by peft alone: --peft_exact true, or merge it with --to hf")
    layers = plain_lora(methods, modules) if is_sum else lora_layers(methods, modules, kind, exact)
    stored, r, options = {}, len(next(iter(layers.values()))[0]), LoRA(**header["options"])
    keeps_scale = exact and not is_sum and r == options.r  # not of layers that are fused
    if not keeps_scale:
        options = LoRA(r, float(r), dropout=options.dropout)
    for theirs, (A, B) in layers.items():
        start, ours = modules.full(theirs), modules.ours[theirs]
        stored |= {f"{start}.lora_A.weight": A, f"{start}.lora_B.weight": B / options.scale}
        if is_dora:
            norms = torch.cat([modules.base.tensor(f"{name}.weight").float().norm(dim=-1) for name in ours])
            for name, size in modules.split(theirs, norms):
                size += tensors.get(f"{name}.deltas.dora.magnitude", 0)
            stored[f"{start}.lora_magnitude_vector"] = norms
    return dict(
        peft_type="LORA", r=r, lora_alpha=options.alpha, lora_dropout=options.dropout, bias="none",
        use_rslora=options.rslora, target_modules=modules.targets(layers),
        fan_in_fan_out=bool(modules.family.transposed), use_dora=is_dora,
    ), stored  # fmt: skip


def write_mlx(out_dir: Path, methods: Methods, base: Folder) -> None:
    """Writes a LoRA as mlx-lm's adapter folder. Raises ValueError if it is none, or `out_dir` is in use."""
    refuse_used(out_dir)
    layers, stored = plain_lora(methods, Modules(base)), {}
    for theirs, (A, B) in layers.items():
        name = base.family.full_name(f"{theirs}.")
        stored |= {f"{name}lora_a": A.T.contiguous(), f"{name}lora_b": B.T.contiguous()}
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", theirs) for theirs in layers})
    parameters = dict(rank=len(A), scale=1.0, dropout=0.0, keys=keys)
    config = dict(fine_tune_type="lora", num_layers=base.config.n_layer, lora_parameters=parameters)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(stored, out_dir / "adapters.safetensors", dict(format="mlx"))
    (out_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_tokens(tokens: dict[str, int], tensors: Named, stored: Named, modules: Modules) -> dict[str, Any]:
    ids = sorted(tokens.values())
    if ids[-1] >= modules.base.config.vocab_size:
        raise ValueError("peft cannot say tokens beyond the vocabulary of the base: merge them with --to hf")
    places = ["wte"] if modules.base.config.tie else ["wte", "lm_head"]
    for name in places:
        stored[f"{modules.full(modules.theirs(name))}.{TOKENS}"] = tensors[f"{name}.deltas.tokens.rows"]
    return dict(trainable_token_indices={modules.theirs(name): ids for name in places})


def _write_virtual(tensors: Named, modules: Modules) -> tuple[dict[str, Any], Named]:
    (t,), shape = tensors.values(), modules.base.config  # (P, C), or (L, 2, P, nkv, hs)
    kind, heads, size = "PROMPT_TUNING", shape.n_head, shape.n_embd
    if t.dim() == 5:
        kind, heads, size = "PREFIX_TUNING", shape.n_kv_head, shape.n_kv_head * shape.head_size
        t = t.permute(2, 0, 1, 3, 4).flatten(1)  # (P, L 2 nkv hs)
    return dict(
        peft_type=kind, num_virtual_tokens=len(t), num_layers=shape.n_layer, token_dim=size, num_attention_heads=heads,
        num_transformer_submodules=1,
    ), dict(prompt_embeddings=t)  # fmt: skip


def _write_ia3(tensors: Named, modules: Modules) -> tuple[dict[str, Any], Named]:
    scales, stored, inner = {name.removesuffix(".deltas.ia3.scale"): t for name, t in tensors.items()}, {}, []
    for theirs, ours in modules.ours.items():
        if (inside := scales.get(ours[0], scales.get(ours[0].replace("down", "up")))) is not None and "down" in ours[0]:
            inner.append(theirs)
            stored[theirs] = inside[None]
        elif "attn" in theirs and any(name in scales for name in ours):
            parts = [scales.get(name, torch.ones(modules.n_out[name])) for name in ours]
            stored[theirs] = torch.cat(parts)[:, None]
    names = dict(target_modules=modules.targets(stored), feedforward_modules=modules.targets(inner))
    config = dict(peft_type="IA3", fan_in_fan_out=bool(modules.family.transposed)) | names
    return config, {f"{modules.full(theirs)}.ia3_l": t for theirs, t in stored.items()}


def _write_norms(tensors: Named, modules: Modules) -> tuple[dict[str, Any], Named]:
    if odd := next((name for name in tensors if "norm" not in name), None):
        raise ValueError(f"peft cannot say a trained {odd}; merge it with --to hf")
    stored, chosen = {}, set()
    for name, t in tensors.items():
        module, _, kind = name.rpartition(".")
        chosen.add(modules.theirs(module))
        stored[f"{modules.full(modules.theirs(module))}.ln_tuning_layers.{kind}"] = t
    return dict(peft_type="LN_TUNING", target_modules=modules.targets(chosen)), stored


WRITERS = dict(prefix=_write_virtual, prompt=_write_virtual, ia3=_write_ia3, selective=_write_norms)
