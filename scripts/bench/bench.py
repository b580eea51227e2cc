"""Measures training: tokens a second, memory, and the share of the time that its matrix products alone would take. With
--peers also transformers + peft, on batches of the same examples in the same run, padded and grouped by length.

The network has random weights, which does not change its speed. The examples are as long as Alpaca's 52,002, begin with
one of two preambles, and half of their tokens are targets; --data demo takes the demo's 999 rows instead. "Real" tokens
are those of the examples, whatever is computed for them. The figures are those of whole optimizer steps; results are
added to a CSV file and printed as a table.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_fabric import Fabric

from finetune import loop, memory, setup
from finetune.devices import launch
from finetune.report import Step, peak_memory
from scripts.bench.flops import n_flops, peak_tflops
from lit_model.methods import adapter, adapter_v2, bottleneck, full, ia3, lora, prefix, prompt
from lit_model import model
from lit_model.load import freeze, initialize
from lit_model.cli import cli
from lit_model.packing import Example
from lit_model.quantize import quantize
from scripts.bench_table import Result, commit, open_table, read_lines, save, scaling_table, series, table
from scripts.kernel_time import product_seconds, profile, sync
from scripts.workload import alpaca_lengths, demo_examples

ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
METHODS = {  # name -> its file, and the fields of its Config
    "adapter": (adapter, {}),
    "adapter_v2": (adapter_v2, {}),
    "bottleneck": (bottleneck, {}),
    "dora": (lora, dict(lora=lora.LoRA(dora=True))),
    "dora-all": (lora, dict(lora=lora.LoRA(r=16, targets=ALL_LINEARS, dora=True))),
    "full": (full, {}),
    "ia3": (ia3, {}),
    "lora": (lora, {}),
    "lora-all": (lora, dict(lora=lora.LoRA(r=16, targets=ALL_LINEARS))),
    "prefix": (prefix, {}),
    "prompt": (prompt, {}),
}
PRECISIONS = {"bf16": "none", "fp32": "none", "fp8": "fp8", "int8": "int8", "nf4": "nf4"}  # the base weights
PEER_PRECISIONS = ("bf16", "fp32", "nf4")  # nf4: bitsandbytes'
DEMO_VOCABULARY = 49_152
WARM_UP = 3  # steps that are not counted


@dataclass
class Options:
    """What to measure."""

    preset: str = "llama-7b"
    """shape of the network: a name in lit_model/presets.py"""
    methods: str = "adapter,lora"
    """of adapter, adapter_v2, bottleneck, dora, full, ia3, lora (rank 8 on q and v), lora-all, dora-all (rank 16 on all
    linear layers), prefix, prompt"""
    precision: str = "bf16"
    """of bf16, fp8, int8, nf4 (the base weights; activations in bf16) and fp32"""
    peers: Literal["", "hf-peft", "hf-peft-plain"] = ""
    """hf-peft: also transformers + peft, from requirements-dev.txt; in bf16 (beside fp8 and int8, too), fp32, and
    bitsandbytes' nf4. hf-peft-plain: as it comes, a step's examples in their order, padded to the longest"""
    devices: str = "auto"
    """as in the finetuning scripts: auto, cpu, 2, cpu:2; several such as 1,2,8 are measured one after the other"""
    strategy: str = "auto"
    """of several devices: ddp, fsdp or fsdp_offload; or some of them, such as ddp,fsdp"""
    data: Literal["alpaca-lengths", "demo"] = "alpaca-lengths"
    """alpaca-lengths: random tokens in examples of Alpaca's lengths; demo: the rows of the demo"""
    batch_size: int = 128
    """examples per optimizer step and device"""
    row_tokens: int = 16384
    """most tokens of a packed row"""
    steps: int = 10
    """optimizer steps that count, after three that do not; the peer takes two after one"""
    memory_gb: float | None = None
    """GiB of the GPU's memory to use at most"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, as in the finetuning scripts"""
    recompute: Literal["auto", "on"] = "auto"
    """on: recompute blocks in the backward pass (activation checkpointing) even if memory suffices without"""
    profile: bool = False
    """also say which kernels take the time of a step"""
    out: Path = Path("out/bench.csv")
    """file that the results are added to"""


def main(options: Options) -> None:
    wanted = [(m.strip(), p.strip()) for m in options.methods.split(",") for p in options.precision.split(",")]
    for method, precision in wanted:
        if method not in METHODS or precision not in PRECISIONS:
            known = f"methods are {', '.join(METHODS)}; precisions are {', '.join(PRECISIONS)}"
            raise ValueError(f"there is no {method!r} in {precision!r}: {known}")
        if method == "full" and PRECISIONS[precision] != "none":
            raise ValueError(f"full finetuning trains the weights that {precision} would freeze")
    if "," in options.devices + options.strategy:
        return one_after_the_other(options)
    for name in ("batch_size", "row_tokens", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least 1")
    on_gpu = not options.devices.startswith("cpu") and torch.cuda.is_available()
    if options.memory_gb is not None and not (on_gpu and options.memory_gb > 0):
        raise ValueError("memory_gb is a positive number of GiB of a GPU's memory, and needs one")
    config = model.Config.from_name(options.preset)
    if options.peers and config.arch != "llama":
        raise ValueError(f"{options.preset} has no peer here; presets of LLaMA's family do")
    if options.peers and not (find_spec("transformers") and find_spec("peft")):
        raise ValueError("--peers needs transformers and peft: pip install -r requirements-dev.txt")
    if options.data == "demo" and config.vocab_size < DEMO_VOCABULARY:
        raise ValueError(
            f"the demo's rows need a vocabulary of {DEMO_VOCABULARY}, and {options.preset} has {config.vocab_size}: "
            "take --preset smollm2-135m or --data alpaca-lengths"
        )
    open_table(options.out)  # what cannot be written shall show now
    if not on_gpu:
        memory.keep_freed_memory()
    fabric = launch(options.devices, options.strategy)
    if options.peers and fabric.world_size > 1:
        raise ValueError("--peers measures one device")
    examples = demo_examples() if options.data == "demo" else alpaca_lengths(config.vocab_size)
    where = torch.cuda.get_device_name() if fabric.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = asdict(options) | dict(on=where, torch=torch.__version__, commit=commit())

    results, peers = [], {}
    for method, precision in wanted:
        result = _try(ours, method, precision, config, examples, fabric, options)
        theirs_in = precision if precision in PEER_PRECISIONS else "bf16"
        if options.peers and (method, theirs_in) not in peers:
            peers[method, theirs_in] = _try(theirs, method, theirs_in, config, examples, fabric, options)
            if peers[method, theirs_in] and fabric.is_global_zero:
                save(options.out, peers[method, theirs_in], about)
        if result:
            peer = peers.get((method, theirs_in))
            result.ratio = peer and result.tokens_per_second / peer.tokens_per_second
            results.append(result)
            if fabric.is_global_zero:
                save(options.out, result, about)
    if not results:
        raise ValueError("nothing could be measured")
    results += [peer for peer in peers.values() if peer]
    where = f"{fabric.world_size} x {where}" if fabric.world_size > 1 else where
    where = f"{where}, torch {torch.__version__}, commit {about['commit']}"
    each = " and device" if fabric.world_size > 1 else ""
    print(f"\n{options.preset}, {options.batch_size} examples a step{each}, {where}")
    print(table(results))
    print(f"added {len(results)} results to {options.out}")


def one_after_the_other(options: Options) -> None:
    """Starts this script once for each number of devices and strategy, and shows all results as one table."""
    open_table(options.out)
    before, failed = len(read_lines(options.out)), []
    for devices, strategy in series(options.devices, options.strategy):
        given = asdict(options) | dict(devices=devices, strategy=strategy)
        args = [f"--{name}={value}" for name, value in given.items() if value is not None]
        done = subprocess.run([sys.executable, str(Path(__file__).resolve()), *args])
        failed += [f"{devices} {strategy}"] * (done.returncode != 0)
    rows = read_lines(options.out)[before:]
    on = f"{rows[0]['on']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}" if rows else "nothing measured"
    print(f"\n{options.preset}, {options.batch_size} examples a step and device, {on}")
    print(scaling_table(rows))
    if failed:
        raise ValueError(f"could not be measured: {', '.join(failed)}")


def _try(measure: Callable[..., Result], method: str, precision: str, *rest: Any) -> Result | None:
    """What fails does not take the others' results with it."""
    try:
        result = measure(method, precision, *rest)
        after = f", after a start of {result.start_s:.0f} s" if result.start_s else ""
        print(f"{result.system}: {method} {precision} {result.tokens_per_second:.0f} tokens/s{after}", flush=True)
    except Exception as e:  # of whatever library the peer uses
        if os.environ.get("LIT_TRACEBACK"):
            raise
        who = "lit-model" if measure is ours else "the peer"
        print(f"{who}: {method} {precision} failed: {type(e).__name__}: {e}", file=sys.stderr)
        result = None
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return result


def gpu_memory(device: torch.device) -> float | None:
    return peak_memory(device) if device.type == "cuda" else None


# ------------------------------------------------------------------------------------------------------------ ours


def ours(
    method: str, precision: str, config: model.Config, examples: list[Example], fabric: Fabric, options: Options
) -> Result:
    world = fabric.world_size
    train = setup.Train(batch_size=options.batch_size * world, lr=1e-4)
    settings = setup.Options(train=train, compile=options.compile, memory_gb=options.memory_gb)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    run = setup.Run(settings, fabric, dtype, None, examples, [], options.row_tokens)
    torch.manual_seed(0)
    began = sync(fabric.device)
    gpt = build(method, precision, config, dtype, fabric.device)
    run, network, optimizer, plan = loop.prepare(run, gpt)
    if plan:
        print(plan.report)
    if options.recompute == "on" and gpt.recompute == "off":
        gpt.recompute = "on"
    stream = loop.ahead(loop.with_rows(loop.batches(examples, run.options.train), gpt, run, share=True))

    def take(n: int) -> list[Step]:
        steps = []
        for batch, rows in islice(stream, n):
            steps.append(Step(len(steps), train.lr, batch))
            loop.train_step(run, network, optimizer, steps[-1], rows)
        return steps

    take(WARM_UP)
    if fabric.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = sync(fabric.device)
    steps = take(options.steps)
    seconds = sync(fabric.device) - start
    real, computed = sum(len(e.ids) for s in steps for e in s.batch), sum(s.n_computed for s in steps)
    targets, own_targets = sum(s.n_targets for s in steps), sum(s.n_own_targets for s in steps)
    peak = gpu_memory(fabric.device)
    if options.profile:
        profile(lambda: take(1), f"{method} {precision}", fabric.device)
    tflops = peak_tflops(gpt) if fabric.device.type == "cuda" else None
    _, batches = next(stream)
    alone = product_seconds(gpt, fabric.device, len(batches), computed / len(steps), own_targets / len(steps))
    return Result(
        "lit-model",
        method,
        precision,
        setting=f"{len(batches)} rows of {computed / len(steps) / len(batches):,.0f} tokens"
        + ("" if gpt.recompute == "off" else ", blocks recomputed")
        + (", inputs on the host" if gpt.recompute == "offload" else ""),
        tokens_per_second=real / seconds,
        step_ms=1e3 * seconds / len(steps),
        start_s=start - began,
        peak_gib=peak,
        loss=steps[-1].receive()[0],
        targets=targets / real,
        mfu=tflops and n_flops(gpt, computed, own_targets) / seconds / tflops / 1e12,
        products=alone * len(steps) / seconds,
        world=world,
    )


def with_method(method: str, config: model.Config) -> model.Config:
    module, method_options = METHODS[method]
    return module.Config(**asdict(config), **method_options)


def build(method: str, precision: str, config: model.Config, dtype: torch.dtype, device: torch.device) -> model.GPT:
    """A network of random weights with the method in it, quantized block by block."""
    module, _ = METHODS[method]
    with torch.device("meta"):
        gpt = module.GPT(with_method(method, config))
    for block in gpt.blocks:
        initialize(block.to(dtype), device)
        if PRECISIONS[precision] != "none":
            quantize(block, PRECISIONS[precision], last=block is gpt.blocks[-1])
    for name, part in gpt.named_children():
        if name != "blocks":
            initialize(part.to(dtype), device)
    gpt.dtype = dtype
    gpt.tie()
    freeze(gpt, module.trainable)
    return gpt.train()


# ----------------------------------------------------------------------------------------------- transformers + peft


def theirs(
    method: str, precision: str, config: model.Config, examples: list[Example], fabric: Fabric, options: Options
) -> Result:
    """The fastest of a few micro-batch sizes, nothing recomputed; or plain, see Options.peers."""
    from scripts import peers  # only this needs transformers and peft

    device = fabric.device
    network = peers.build(method, precision, with_method(method, config), device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = list(islice(loop.batches(examples, setup.Train(batch_size=options.batch_size)), 3))
    plain = options.peers == "hf-peft-plain"
    sizes, best = [n for n in (4, 8, 16, 32, 64) if n < options.batch_size and not plain] + [options.batch_size], None

    if not plain:
        batches = [sorted(batch, key=lambda e: len(e.ids)) for batch in batches]

    def step(batch: list[Example], micro: int) -> tuple[float, int, int]:
        n_targets, total = sum(e.n_targets for e in batch), 0.0
        for tensors in peers.padded(batch, micro, device):
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")
            with autocast:
                loss = network(**tensors, num_items_in_batch=n_targets).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, sum(len(e.ids) for e in batch), n_targets

    for micro in sizes:
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step(batches[0][-micro:], micro)  # to warm up, with what takes most memory
            start = sync(device)
            loss, real, targets = (sum(part) for part in zip(*(step(batch, micro) for batch in batches[1:])))
            seconds = sync(device) - start
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            break
        result = Result(
            "transformers + peft" if method != "full" else "transformers",
            method,
            precision,
            setting=f"{micro} examples a time",
            tokens_per_second=real / seconds,
            step_ms=1e3 * seconds / 2,
            peak_gib=gpu_memory(device),
            loss=float(loss) / 2,
            targets=targets / real,
        )
        if best and result.tokens_per_second < best.tokens_per_second:
            break
        best = result
    if best is None:
        raise ValueError(f"transformers: {method} {precision} does not fit")
    return best


if __name__ == "__main__":
    cli(main, Options, __doc__)
