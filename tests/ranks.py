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

from finetune import loop, setup
from finetune.devices import launch
from finetune.report import Step
from lit_model import lora
from lit_model.checkpoint import fingerprint_of, save_method
from lit_model.packing import Example
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
    do = read_slices if "slices" in sys.argv[3] else main
    do(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
