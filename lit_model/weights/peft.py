"""PEFT's adapter folders, adapter_config.json and adapter_model.safetensors: read as a method of ours, and written.

    LORA             lora; dora with use_dora; new tokens with trainable_token_indices; a head in modules_to_save
    PREFIX_TUNING    prefix         PROMPT_TUNING    prompt
    IA3              ia3            LN_TUNING        selective, its norms
    ADAPTION_PROMPT  adapter, with one linear gate for all heads of a layer

Where transformers fuses layers (GPT-2's c_attn) a LoRA of ours on each of k of them is one of rank k r there: the As
one below the other, the Bs along the diagonal.
"""

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_model.data.tokenizer import Tokenizer
from lit_model.files import read_json, reading
from lit_model.methods import ia3
from lit_model.methods.adapter import Adapter
from lit_model.methods.dora import DoRA
from lit_model.methods.ia3 import IA3
from lit_model.methods.lora import LoRA
from lit_model.methods.prefix import Prefix
from lit_model.methods.prompt import Prompt
from lit_model.methods.selective import Selective
from lit_model.model import GPT
from lit_model.weights.folder import Folder, network_shapes, unpickled

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = "token_adapter.trainable_tokens_delta"
Named = dict[str, Tensor]


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
        return self.family.stored(f"{name}.weight").removesuffix(".weight")

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
        stored = load_file(path) if path.is_file() else unpickled(path.with_suffix(".bin"))
        prefixes = rf"(_orig_mod\.|base_model\.model\.|{re.escape(base.family.prefix)}(?=.*\.))*"
        theirs = {re.sub(f"^{prefixes}", "", name.replace("._orig_mod.", ".")): t.float() for name, t in stored.items()}
        modules, tokens = Modules(base), {}
        found = _take_tokens(config, theirs, modules, tokens)
        method, options, tensors = READERS[kind](config, theirs, modules)
        if theirs:
            raise ValueError(f"it has a tensor {min(theirs)}, which no method here has a place for")
    header = dict(method=method, options=asdict(options) if options else {}, base=base.identity, quantize="none")
    return header | dict(task=None, tokens=tokens), tensors | found


def _take(theirs: Named, kind: str) -> Named:
    """Takes the tensors whose names end in `kind` out: their module -> tensor."""
    return {name.removesuffix(f".{kind}"): theirs.pop(name) for name in list(theirs) if name.endswith(f".{kind}")}


def _take_tokens(config: dict[str, Any], theirs: Named, modules: Modules, tokens: dict[str, int]) -> Named:
    """The rows of trained tokens, which are added to `tokens`."""
    found, indices = _take(theirs, TOKENS), config.get("trainable_token_indices")
    if not found:
        return {}
    base, tokenizer = modules.base, Tokenizer(modules.base.path)
    ids = indices[next(iter(indices))] if isinstance(indices, dict) else indices
    tokens |= {tokenizer.token(i): i for i in sorted(ids)}
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rows = {f"{modules.ours[name][0]}.deltas.tokens.rows": t[order] for name, t in found.items()}
    if not base.config.tie:
        own = base.tensor("lm_head.weight")[sorted(ids)].float()
        rows = {"lm_head.deltas.tokens.rows": own} | rows
    return rows


def _read_lora(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, LoRA, Named]:
    method = "dora" if config.get("use_dora") else "lora"
    As, Bs, sizes = (_take(theirs, f"lora_{kind}") for kind in ("A.weight", "B.weight", "magnitude_vector"))
    rslora, layers = bool(config.get("use_rslora")), {}
    for name, A in As.items():
        alpha = next(
            (a for key, a in (config.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name)),
            config["lora_alpha"],
        )
        for ours, B in modules.split(name, Bs.pop(name)):
            layers[ours] = A, B, alpha / (math.sqrt(len(A)) if rslora else len(A))
    ranks, scales = {len(A) for A, _, _ in layers.values()}, {scale for _, _, scale in layers.values()}
    r, is_one = max(ranks), len(ranks) == len(scales) == 1
    tensors = {}
    for name, (A, B, scale) in layers.items():
        A, B = (A, B) if is_one else (_padded(A, 0, r), _padded(B, 1, r) * scale)
        tensors |= {f"{name}.deltas.{method}.A": A, f"{name}.deltas.{method}.B": B.contiguous()}
    for name, size in sizes.items():
        for ours, part in modules.split(name, size.flatten()):
            norms = modules.base.tensor(f"{ours}.weight").float().norm(dim=-1)
            tensors[f"{ours}.deltas.dora.magnitude"] = part - norms
    head = {name: theirs.pop(name) for name in list(theirs) if name == "lm_head.weight"}  # of modules_to_save
    alpha = scales.pop() * (math.sqrt(r) if rslora else r) if is_one else r
    kind = LoRA if method == "lora" else DoRA
    theirs |= Bs
    options = kind(r, alpha, ",".join(layers), config.get("lora_dropout") or 0.0, rslora and is_one)
    return method, options, tensors | head


def _padded(t: Tensor, dim: int, n: int) -> Tensor:
    """With zeros up to n along a dimension."""
    missing = list(t.shape)
    missing[dim] = n - t.shape[dim]
    return torch.cat((t, t.new_zeros(missing)), dim)


def _read_prefix(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, Prefix, Named]:
    kv, shape = theirs.pop("prompt_embeddings"), modules.base.config
    kv = kv.view(len(kv), shape.n_layer, 2, shape.n_kv_head, shape.head_size).permute(1, 2, 0, 3, 4)
    return "prefix", Prefix(kv.shape[2], "zero"), {"virtual_keys.prefix.kv": kv.contiguous()}


def _read_prompt(config: dict[str, Any], theirs: Named, modules: Modules) -> tuple[str, Prompt, Named]:
    t = theirs.pop("prompt_embeddings")
    return "prompt", Prompt(len(t)), {"virtual_tokens.prompt.embedding": t}


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
    LORA=_read_lora, PREFIX_TUNING=_read_prefix, PROMPT_TUNING=_read_prompt, IA3=_read_ia3, LN_TUNING=_read_norms,
    ADAPTION_PROMPT=_read_adapter,
)  # fmt: skip
