"""Measures training: tokens a second, memory, and the share of the time that its matrix products alone would take. With
--peers also transformers + peft, on batches of the same examples in the same run, padded and grouped by length.

The network has random weights, which does not change its speed. The examples are as long as Alpaca's 52,002, begin with
one of two preambles, and half of their tokens are targets; --data demo takes the demo's 999 rows instead. "Real" tokens
are those of the examples, whatever is computed for them. The figures are those of whole optimizer steps; results are
added to a file, one JSON object a line, and printed as a table.
"""

import gc
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import islice, product
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric

from finetune import memory
from finetune.devices import launch, total
from finetune.loop import ahead, train_step
from finetune.report import Step, peak_memory
from finetune.run import Run, RunOptions, Train, batches, build, prepare
from lit_model.cli import cli
from lit_model.load import METHODS, method_options
from lit_model.model import Config
from lit_model.packing import Example, Packed
from scripts.bench.bench_table import Result, commit, read_lines, table
from scripts.bench.kernel_time import attention_seconds, mfu, print_kernels, product_seconds, sync
from scripts.bench.workload import RandomFolder, alpaca_lengths, demo_examples, of_length

ALL = dict(r=16, targets="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj")
VARIANTS = {"lora-all": ("lora", ALL), "lora-all-r32": ("lora", ALL | dict(r=32)), "dora-all": ("dora", ALL)}
VARIANTS["lora-qkv"] = "lora", dict(r=16, targets="q_proj,k_proj,v_proj")
PRECISIONS = {"bf16": "none", "fp32": "none", "fp8": "fp8", "int8": "int8", "nf4": "nf4"}  # the base weights
PEER_PRECISIONS = ("bf16", "fp32", "nf4")  # nf4: bitsandbytes'
WARM_UP, PROFILED = 3, 3  # steps that are not counted


@dataclass
class Options:
    """What to measure."""

    preset: str = "llama-7b"
    """shape of the network: a name in lit_model/presets.json"""
    methods: str = "adapter,lora"
    """names of methods, such as full or lora (rank 8 on q and v); also lora-all, dora-all (rank 16 on all linear
    layers), lora-all-r32, lora-qkv"""
    precision: str = "bf16"
    """some of bf16, fp8, int8, nf4 (the base weights; activations in bf16) and fp32"""
    peers: Literal["", "hf-peft", "hf-peft-plain"] = ""
    """hf-peft: also transformers + peft, from requirements-dev.txt; in bf16 (beside fp8 and int8, too), fp32, and
    bitsandbytes' nf4. hf-peft-plain: as it comes, a step's examples in their order, padded to the longest"""
    devices: str = "auto"
    """as in the finetuning scripts: auto, cpu, 2, cpu:2; several such as 1,2,8 are measured one after the other"""
    strategy: str = "auto"
    """use of several devices: ddp, fsdp or fsdp_offload; or some of them, such as ddp,fsdp"""
    data: Literal["alpaca-lengths", "demo"] = "alpaca-lengths"
    """alpaca-lengths: random tokens in examples of Alpaca's lengths; demo: the rows of the demo"""
    example_length: int | None = None
    """examples of this many random tokens instead, such as 16384 with --batch_size 1"""
    batch_size: int = 128
    """examples per optimizer step and device"""
    steps: int = 10
    """optimizer steps that count, after three that do not; a single one is the very first. The peer takes two
    after one"""
    memory_gb: float | None = None
    """most GiB of the GPU's memory to use"""
    profile: bool = False
    """also print which kernels take the time of a step"""
    out: Path = Path("out/bench.jsonl")
    """file that the results are added to"""


@dataclass
class Case:
    """A line of the table to be."""

    options: Options
    config: Config
    examples: list[Example]
    fabric: Fabric
    name: str
    precision: str

    def __post_init__(self):
        self.method, changes = VARIANTS.get(self.name, (self.name, {}))
        self.method_options = method_options(self.method, **changes)
        self.dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        self.device = self.fabric.device


def main(options: Options) -> None:
    pairs = list(product(*(text.replace(" ", "").split(",") for text in (options.methods, options.precision))))
    for name, precision in pairs:
        if name not in [*METHODS, *VARIANTS] or precision not in PRECISIONS:
            known = f"methods are {', '.join([*METHODS, *VARIANTS])}; precisions are {', '.join(PRECISIONS)}"
            raise ValueError(f"there is no {name!r} in {precision!r}: {known}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.open("a").close()  # what cannot be written shall show now
    n_before = len(read_lines(options.out))
    if "," in options.devices + options.strategy:
        launch_each(options)
    else:
        measure_all(options, pairs)
    lines = read_lines(options.out)[n_before:]
    if not lines:
        raise ValueError("nothing could be measured, see above")
    where = "{on}, torch {torch}, commit {commit}".format(**lines[0])
    print(f"\n{options.preset}, {options.batch_size} examples a step and device, {where}")
    print(table(lines), f"added {len(lines)} results to {options.out}", sep="\n")


def launch_each(options: Options) -> None:
    """Starts this script once for each number of devices and strategy."""
    pairs = product(options.devices.split(","), options.strategy.split(","))
    pairs = dict.fromkeys((d, "auto" if d in ("1", "auto", "cpu", "cpu:1") else s) for d, s in pairs)  # alone: once
    for devices, strategy in pairs:
        values = asdict(options) | dict(devices=devices, strategy=strategy)
        args = [f"--{name}={value}" for name, value in values.items() if value is not None]
        subprocess.run([sys.executable, str(Path(__file__).resolve()), *args])


def measure_all(options: Options, pairs: list[tuple[str, str]]) -> None:
    config = Config.from_name(options.preset)
    if options.devices.startswith("cpu") or not torch.cuda.is_available():
        memory.keep_freed_memory()
    fabric = launch(options.devices, options.strategy)
    if options.example_length:
        examples = of_length(options.example_length, config.vocab_size)
        config = replace(config, block_size=max(config.block_size, options.example_length + 1))
    else:
        examples = demo_examples() if options.data == "demo" else alpaca_lengths(config.vocab_size)
    config.check_tokens(max(int(e.ids.max()) for e in examples))
    for name, precision in pairs:
        measure(ours, Case(options, config, examples, fabric, name, precision))
    for name, precision in dict.fromkeys((n, p if p in PEER_PRECISIONS else "bf16") for n, p in pairs if options.peers):
        measure(theirs, Case(options, config, examples, fabric, name, precision))


def measure(measured: Callable[[Case], Result], case: Case) -> None:
    """Adds a result to the file. What fails does not take the others with it."""
    try:
        result = measured(case)
        print(f"{result.system}: {case.name} {case.precision} {result.tokens_per_second:.0f} tokens/s", flush=True)
        on = torch.cuda.get_device_name() if case.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        about = dict(when=datetime.now().isoformat(timespec="minutes"), on=on, torch=torch.__version__, commit=commit())
        about |= asdict(case.options) | dict(method=case.name, precision=case.precision, world=case.fabric.world_size)
        if case.fabric.is_global_zero:
            with open(case.options.out, "a") as file:
                file.write(json.dumps(about | asdict(result), default=str) + "\n")
    except Exception:  # of whatever library the peer uses
        traceback.print_exc()
        print(f"{measured.__name__}: {case.name} {case.precision} failed", flush=True)
    case.fabric.barrier()  # until the line is in the file
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ ours


def ours(case: Case) -> Result:
    options, device, world = case.options, case.device, case.fabric.world_size
    n_steps = WARM_UP + options.steps + PROFILED
    train = Train(lr=1e-4, batch_size=options.batch_size * world, epochs=10**6, max_steps=n_steps, sample="")
    settings = RunOptions(train=train, quantize=PRECISIONS[case.precision], memory_gb=options.memory_gb)
    torch.manual_seed(0)
    began = sync(device)
    run = Run(
        settings, case.fabric, case.dtype, RandomFolder(case.config, case.dtype, device), tokenizer=None,
        train_examples=case.examples, val_examples=[], row_tokens=16384, task=None, state=None, progress=None,
    )  # fmt: skip
    gpt = build(run, case.method, case.method_options)
    network, optimizer = prepare(run, gpt, share=True)
    stream = ahead(run.steps(gpt))

    def take(n: int) -> list[tuple[Step, int, int, int, Packed]]:
        """Steps, and of this process the rows of each, the tokens and targets in those that count, and the first."""
        steps = []
        for step, rows in islice(stream, n):
            train_step(run, network, optimizer, step, rows)
            own = [packed for _, packed in rows if packed.weight]
            sizes = len(rows), sum(len(p.pos) for p in own), sum(len(p.targets) for p in own)
            steps.append((step, *sizes, rows[0][1]))
        return steps

    take(WARM_UP if options.steps > 1 else 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = sync(device)
    steps, *counts, packed = zip(*take(options.steps))
    seconds = sync(device) - start
    peak = peak_memory(device)
    if options.profile:
        print_kernels(lambda: take(PROFILED), device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)  # products alone may take more than --memory_gb
    n_real = sum(len(e.ids) for s in steps for e in s.batch)
    n_rows, n_computed, n_own_targets = map(sum, counts)
    return Result(
        "lit-model",
        f"{n_rows / len(steps):.0f} rows of {n_computed / n_rows:,.0f} tokens{memory.what_is_recomputed(gpt)}",
        tokens_per_second=n_real / seconds,
        step_ms=1e3 * seconds / len(steps),
        peak_gib=peak,
        loss=total(steps[-1].loss).item(),
        start_s=start - began,
        mfu=mfu(gpt, n_computed, n_own_targets, seconds),
        products=product_seconds(gpt, device, n_rows, n_computed, n_own_targets) / seconds,
        attention=attention_seconds(gpt, packed[0].to(device), device) * n_rows / seconds,
    )


# ----------------------------------------------------------------------------------------------- transformers + peft


def theirs(case: Case) -> Result:
    """The fastest of a few micro-batch sizes, nothing recomputed; or plain, see Options.peers."""
    from scripts.bench import peers  # only this needs transformers and peft

    options, device = case.options, case.device
    network = peers.random_network(case.options.preset, torch.float32 if case.method == "full" else case.dtype, device)
    if case.precision == "nf4":
        peers.to_nf4(network)
    network = network.train() if case.method == "full" else peers.attach(network, case.method, case.method_options)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)
    warm_up, *counted = islice(batches(case.examples, Train(batch_size=options.batch_size)), 3)
    sizes, length = [options.batch_size], lambda e: len(e.ids)
    if options.peers == "hf-peft":
        sizes = [n for n in (4, 8, 16, 32, 64) if n < options.batch_size] + sizes
        warm_up, *counted = (sorted(batch, key=length) for batch in (warm_up, *counted))
    n_real, best = sum(length(e) for batch in counted for e in batch), None
    for size in sizes:
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            peers.train_step(network, optimizer, warm_up[-size:], size, case.dtype)  # with what takes most memory
            start = sync(device)
            loss = sum(peers.train_step(network, optimizer, batch, size, case.dtype) for batch in counted)
            seconds = sync(device) - start
        except torch.OutOfMemoryError:
            if best is None:
                raise
            break
        if best and n_real / seconds < best.tokens_per_second:
            break
        best = Result(
            "transformers" if case.method == "full" else "transformers + peft",
            f"{size} examples a time",
            tokens_per_second=n_real / seconds,
            step_ms=1e3 * seconds / len(counted),
            peak_gib=peak_memory(device),
            loss=float(loss) / len(counted),
        )
    return best


if __name__ == "__main__":
    cli(main, Options, __doc__)
