"""Measures decoding: tokens a second after a prompt, and the share of the memory's bandwidth that reading the weights
takes; with --peers also transformers with a static cache, compiled, and as it comes.

The networks have random weights, which does not change their speed. A row of --rows is PRESET:PRECISION:BATCH, with a
method behind it if there is one: llama-7b:bf16:1, llama-7b:nf4:1, llama-7b:bf16:1:lora. PRECISION mixed: seven methods
and the base in one batch. Also prefill:PRESET:TOKENS; shared:PRESET:BATCH, prompts of 32 tokens alone, and behind the
same 1,000.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_model import GPT
from lit_model.cli import cli
from lit_model.decode import Decoder, Request
from lit_model.load import choose_device, empty_network, install_method, is_base, load_base, method_options
from lit_model.methods.side_by_side import SideBySide
from lit_model.model import Config
from lit_model.sampling import Sampling
from scripts.bench.bench_table import commit
from scripts.bench.kernel_time import print_kernels, sync
from scripts.bench.workload import RandomFolder

ROWS = (
    "llama-7b:bf16:1,llama-7b:bf16:1:lora,llama-7b:bf16:1:adapter,llama-7b:int8:1,llama-7b:nf4:1,llama-7b:fp8:1,"
    "llama-7b:bf16:32,llama-7b:mixed:32,llama-3.1-8b:bf16:64,prefill:llama-7b:1000,shared:llama-7b:64"
)

GREEDY = Sampling(0)


@dataclass
class Options:
    """What to measure."""

    rows: str = ROWS
    """what to measure, see above, with commas between them"""
    prompt: int = 512
    """tokens of a prompt"""
    new: int = 100
    """tokens that follow it"""
    peers: bool = False
    """also transformers, for rows in bf16 without a method"""
    profile: bool = False
    """also print which kernels take the time of a step"""
    device: str = "auto"
    """auto: the GPU if there is one"""
    out: Path = Path("out/decode.jsonl")
    """file that the results are added to"""


def main(options: Options) -> None:
    device = choose_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in options.rows.split(","):
        with torch.no_grad():
            result = dict(row=row) | measure(row, options, device) | dict(device=name, commit=commit())
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in result.values()]
        print(" | ".join(values), flush=True)
        with open(options.out, "a") as file:
            file.write(json.dumps(result) + "\n")


def measure(row: str, options: Options, device: torch.device) -> dict[str, float]:
    if row.startswith("prefill:"):
        _, preset, n = row.split(":")
        gpt = network(preset, "bf16", device)
        seconds = best(lambda: Decoder.of(gpt, requests(prompts(gpt, 1, int(n)), 1)), device)
        return dict(prefill_ms=1e3 * seconds)
    if row.startswith("shared:"):
        _, preset, n = row.split(":")
        gpt, new = network(preset, "bf16", device), options.new
        own, start = prompts(gpt, int(n), 32), prompts(gpt, 1, 1000)[0]
        longer = [start + ids for ids in own]
        alone = best(lambda: list(Decoder.of(gpt, requests(own, new)).tokens(new)), device)
        both = best(lambda: list(Decoder.of(gpt, requests(longer, new)).tokens(new)), device)
        return dict(seconds_of_own_alone=alone, seconds_with_1000_shared=both)
    preset, precision, batch, *method = row.split(":")
    gpt, batch = network(preset, precision, device, *method), int(batch)
    names = [*gpt.slots] if precision == "mixed" else [None]
    asked = requests(prompts(gpt, batch, options.prompt), options.new + 40, Sampling(0.8, 200), names)
    decoder = Decoder.of(gpt, asked, names if precision == "mixed" else None)
    list(decoder.tokens(16))  # compiles, and captures the graph
    seconds = best(lambda: list(decoder.tokens(options.new // 4)), device)
    speed = batch * (options.new // 4) / seconds
    n_bytes = sum(p.numel() * p.element_size() for name, p in gpt.named_parameters() if "wte" not in name)
    if options.profile:
        print_kernels(lambda: list(decoder.tokens(8)), device)
    result = dict(tokens_per_s=speed, step_ms=1e3 * batch / speed, weights_tb_s=n_bytes * speed / batch / 1e12)
    if options.peers and precision == "bf16" and not method:
        del gpt, decoder
        result |= transformers_speed(preset, batch, options, device)
    return result


def requests(
    prompts: list[list[int]], n_new: int, way: Sampling = GREEDY, names: Sequence[str | None] = (None,)
) -> list[Request]:
    """Of methods in turn."""
    return [Request(ids, n_new, way, names[i % len(names)]) for i, ids in enumerate(prompts)]


def network(preset: str, precision: str, device: torch.device, method: str | None = None) -> GPT:
    config = Config.from_name(preset)
    if precision == "mixed":
        return mixed(config, device)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    folder = RandomFolder(config, dtype, device)
    gpt = empty_network(folder)
    if method:
        install_method(gpt, method, method_options(method), None)
    quantize = precision if precision in ("int8", "nf4", "fp8") else "none"
    load_base(gpt.requires_grad_(False), folder, dtype, device, quantize)
    for name, p in gpt.named_parameters():
        if "deltas" in name:
            p.data.normal_(std=0.02)
    return gpt.eval()


def mixed(config: Config, device: torch.device) -> SideBySide:
    """LoRAs of four ranks, an adapter, a prefix and a prompt beside the base."""
    folder = RandomFolder(config, torch.bfloat16, device)
    gpt = empty_network(folder, SideBySide)
    load_base(gpt, folder, torch.bfloat16, device)
    loras = [("lora", dict(r=r)) for r in (4, 8, 16, 32)]
    for name, options in [*loras, ("adapter", {}), ("prefix", {}), ("prompt", {})]:
        donor = empty_network(folder)
        install_method(donor, name, method_options(name, **options), None)
        own = {path: p.shape for path, p in donor.named_parameters() if not is_base(path)}
        tensors = {path: 0.02 * torch.randn(shape, device=device) for path, shape in own.items()}
        donor.load_state_dict(tensors, strict=False, assign=True)
        gpt.take(f"{name}{len(gpt.slots)}", donor.requires_grad_(False))
    return gpt.eval()


def prompts(gpt: GPT, n: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, gpt.config.vocab_size, (n, length), generator=generator).tolist()


def best(call, device: torch.device, n: int = 3) -> float:
    """The least seconds of n calls."""
    times = []
    for _ in range(n):
        began = sync(device)
        call()
        times.append(sync(device) - began)
    return min(times)


def transformers_speed(preset: str, batch: int, options: Options, device: torch.device) -> dict[str, float]:
    """transformers with a static cache, whose forward it compiles, and with its usual cache."""
    from scripts.bench import peers  # only this needs transformers and peft

    torch.cuda.empty_cache()
    hf = peers.random_network(preset, torch.bfloat16, device, use_cache=True).eval()
    idx, speeds = torch.randint(5, hf.config.vocab_size, (batch, options.prompt), device=device), {}
    how = dict(do_sample=True, temperature=0.8, top_k=200, pad_token_id=0, eos_token_id=None)
    for name, more in (("static", dict(cache_implementation="static")), ("usual", {})):

        def run(n: int, more=more) -> None:
            hf.generate(idx, max_new_tokens=n, min_new_tokens=n, **how, **more)

        run(8)
        one, all_of_them = best(lambda: run(1), device, 2), best(lambda: run(1 + options.new), device, 2)
        speeds[f"transformers_{name}"] = batch * options.new / (all_of_them - one)
    return speeds


if __name__ == "__main__":
    cli(main, Options, __doc__)
