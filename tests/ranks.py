"""What one of several processes computes, for test_ranks.py: loss, gradient and validation loss of each method.

torchrun --nproc_per_node 2 tests/ranks.py FOLDER STRATEGY OUT.pt
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from test_methods import METHODS, shake

from finetune import loop, memory, setup
from finetune.devices import launch
from finetune.report import Step
from lit_model.methods import full, lora
from lit_model.load import fingerprint_of, save_method
from lit_model.packing import Example, pack
from lit_model.quantize import Kind

QUANTIZED: list[tuple[str, Kind]] = [("lora", "nf4"), ("adapter", "int8")]
CASES = [(family, name, "none") for family in ("llama", "gpt2", "newer") for name in METHODS]
CASES += [("llama", name, kind) for name, kind in QUANTIZED]


def examples(n: int) -> list[Example]:
    """Half of them begin alike; lengths differ by far."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(2, 97, 20)
    made = []
    for i, length in enumerate(rng.integers(4, 60, n)):
        ids = rng.integers(2, 97, length)
        ids = np.concatenate((preamble, ids)) if i % 2 else ids
        made.append(Example(ids.astype(np.int32), len(ids) // 2))
    return made


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def compute(run: setup.Run, name: str, row_tokens: int) -> dict:
    module, options = METHODS[name]
    torch.manual_seed(0)
    gpt = setup.build(run, module, **options)
    if not run.sharded or run.options.quantize != "none":
        gpt.to(run.device)
    shake(gpt, module)
    run, network, optimizer, _ = loop.prepare(run, gpt)
    gpt.recompute = "on" if gpt.config.arch == "gpt2" else "off"
    run.row_tokens = row_tokens
    grads, kinds = {}, {n: type(p) for n, p in gpt.named_parameters()}

    def keep() -> None:
        grads.update({n: whole(p.grad) for n, p in gpt.named_parameters() if p.requires_grad})

    optimizer.step = keep
    batch, rows = next(loop.with_rows(iter([run.train_examples]), gpt, run, share=True))
    step = Step(1, 1e-3, batch)
    loop.train_step(run, network, optimizer, step, rows)
    options = next(iter(options.values()), None)
    path = run.options.out_dir / f"{name}.safetensors"
    method = module.__name__.split(".")[-1]
    save_method(path, gpt, method, options, fingerprint_of(run.options.checkpoint_dir), write=run.rank == 0)
    loss, norm = step.receive()[:2]
    val = loop.evaluate(network, gpt, run)
    assert {n: type(p) for n, p in gpt.named_parameters()} == kinds  # slices again, or they would be saved as gathered
    trained = {n: whole(p) for n, p in gpt.named_parameters() if p.requires_grad}
    return dict(loss=loss, norm=norm, grads=grads, trained=trained, val=val, rows=len(rows))


def in_memory() -> dict[str, int]:
    """Bytes of this process: its own, and those of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}


def read_slices(folder: Path, strategy: str, out: Path) -> None:
    """What loading and spreading the network of `folder`/large takes of the host's memory."""
    fabric = launch("cpu", strategy)
    run = setup.Run(setup.Options(checkpoint_dir=folder / "large"), fabric, torch.bfloat16, None, [], [], 4096)
    before = in_memory()
    gpt = setup.build(run, lora)
    fabric.setup_module(gpt)
    grown = {name: size - before[name] for name, size in in_memory().items()}
    (out.parent / f"{out.stem}-{fabric.global_rank}.json").write_text(json.dumps(grown))


class OutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError


def run_out_of_memory(folder: Path, strategy: str, out: Path) -> None:
    """On a pretended GPU, whose memory ends in the backward pass of a block: of the first process only, under DDP."""
    fabric = launch("cpu", strategy)
    run = setup.Run(setup.Options(checkpoint_dir=folder / "llama"), fabric, torch.float32, None, [], [], 4096)
    gpt = setup.build(run, full)
    fabric.setup_module(gpt)
    mlp, mlp_forward, rank = gpt.blocks[1].mlp, gpt.blocks[1].mlp.forward, fabric.global_rank
    fails = lambda: gpt.recompute == "off" and (rank == 0 or strategy != "ddp")  # noqa: E731
    mlp.forward = lambda x: OutOfMemory.apply(mlp_forward(x)) if fails() else mlp_forward(x)
    cuda = torch.cuda
    cuda.mem_get_info, cuda.memory_reserved = lambda device: (2**30, 2**30), lambda device: 0
    cuda.max_memory_allocated, cuda.set_per_process_memory_fraction = lambda: 1000, lambda fraction, device: None
    cuda.empty_cache = cuda.reset_peak_memory_stats = cuda.synchronize = lambda: None
    plan = memory.plan(gpt, fabric.backward, [examples(8)], 4096, True, None, fabric.world_size, torch.device("cpu"))
    assert gpt.recompute == "on" and "blocks recomputed" in plan.report
    idx, packed = pack(examples(8), 4096)[0]
    fabric.backward(gpt(idx, packed))
    assert all(p.grad is not None for p in gpt.parameters())
    assert strategy == "ddp" or all(isinstance(block.mlp.up_proj.weight, DTensor) for block in gpt.blocks)
    (out.parent / f"{out.stem}-{rank}.txt").write_text("fine")


def main(folder: Path, strategy: str, out: Path) -> None:
    fabric = launch("cpu", strategy)
    found = {}
    for family, name, kind in (case for case in CASES if fabric.world_size < 4 or case[0] == "llama"):
        settings = setup.Options(checkpoint_dir=folder / family, quantize=kind, out_dir=out.parent / out.stem / family)
        if fabric.is_global_zero:
            settings.out_dir.mkdir(parents=True, exist_ok=True)
        fabric.barrier()
        data = examples(13)
        run = setup.Run(settings, fabric, torch.float32, None, data, examples(5), 4096)
        found[family, name, kind, 13] = compute(run, name, 70)  # more rows than processes, which do not divide evenly
        if family == "llama":  # a batch of one example: most processes have nothing of their own
            found[family, name, kind, 1] = compute(replace(run, train_examples=data[:1]), name, 4096)
    if fabric.is_global_zero:
        torch.save(found, out)


if __name__ == "__main__":
    jobs = {"slices": read_slices, "memory": run_out_of_memory}
    do = next((job for name, job in jobs.items() if name in Path(sys.argv[3]).name), main)
    do(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
