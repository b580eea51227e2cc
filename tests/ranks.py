"""What one of several processes computes, for test_ranks.py: loss, gradient and validation loss of each method.

torchrun --nproc_per_node 2 tests/ranks.py FOLDER STRATEGY OUT.pt
"""

import atexit
import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401  (the family "newer")
import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from test_methods import METHODS, settings, shake
from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune import memory
from finetune.devices import launch, whole
from finetune.loop import evaluate, train_step
from finetune.report import Ask
from finetune.run import Run, RunOptions, Train, build, prepare
from lit_model import model
from lit_model.load import method_module, save_method
from lit_model.methods.lora import LoRA
from lit_model.packing import Example, Packed, pack
from lit_model.weights.folder import Folder

SOME = ("adapter", "full", "lora", "prefix", "prompt")
CASES = [("llama", name, "none", 13) for name in METHODS]  # family, method, quantize, number of examples
CASES += [(family, name, "none", 13) for family in ("gpt2", "newer") for name in SOME]
CASES += [("llama", name, "none", 1) for name in SOME]  # most processes have nothing of their own
CASES += [("llama", "lora", "nf4", 13), ("llama", "adapter", "int8", 13)]
OF_FOUR = [case for case in CASES if case[0] == "llama" and case[1] in SOME]


def no_thread_of_gloo_is_left() -> None:
    """At the exit: one that frees a tensor while Python ends aborts the process, once in many runs."""
    threads = Path("/proc/self/task").glob("*/comm")
    if left := [name for path in threads if "gloo" in (name := path.read_text().strip())]:
        print(f"at the exit there are still {left}", file=sys.stderr, flush=True)
        os._exit(3)


def examples(n: int) -> list[Example]:
    """Half of them begin alike; lengths differ by far."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(2, 97, 20)
    some = []
    for i, length in enumerate(rng.integers(4, 60, n)):
        ids = rng.integers(2, 97, length)
        ids = np.concatenate((preamble, ids)) if i % 2 else ids
        some.append(Example(ids.astype(np.int32), len(ids) // 2))
    return some


def smoothed(head: torch.nn.Module, x: Tensor, row: Packed) -> Tensor:
    return F.cross_entropy(head(x), row.targets, reduction="sum", label_smoothing=0.1)


def start(fabric: Fabric, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Run:
    """A run of 13 examples, without a tokenizer."""
    settings = RunOptions(checkpoint_dir=folder, train=Train(sample=""), **options)
    return Run(settings, fabric, dtype, Folder(folder), None, examples(13), examples(5), 4096, None, None, None)


def compute(run: Run, name: str) -> dict:
    method, options = settings(name)
    torch.manual_seed(0)
    gpt = build(run, method, options)
    if method == "pissa":
        method_module(method).init_from_base(gpt, options)
    shake(gpt)
    if name == "lora":  # forward computes whatever is to be minimised
        gpt.objective = smoothed
    network, optimizer = prepare(run, gpt, True)
    gpt.recompute = len(gpt.blocks) if gpt.config.arch == "gpt2" else 0
    grads, kinds = {}, {n: type(p) for n, p in gpt.named_parameters()}

    def keep() -> None:
        grads.update({n: whole(p.grad).clone() for n, p in gpt.named_parameters() if p.requires_grad})

    optimizer.step = keep
    step, rows = next(run.steps(gpt))
    train_step(run, network, optimizer, step, rows)
    path = run.options.out_dir / f"{name}.safetensors"
    save_method(path, gpt, method, options, run.base.identity, write=run.rank == 0)
    step.send(Ask.GO)
    loss, norm, _ = step.receive()
    val = evaluate(run, network, gpt)["val_loss"]
    assert {n: type(p) for n, p in gpt.named_parameters()} == kinds  # slices again, or they would be saved as gathered
    trained = {n: whole(p.detach()).clone() for n, p in gpt.named_parameters() if p.requires_grad}
    return dict(loss=loss, norm=norm, grads=grads, trained=trained, val=val)


def in_memory() -> dict[str, int]:
    """Bytes of this process: its own, and those of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}


def read_slices(folder: Path, strategy: str, out: Path) -> None:
    """What loading and spreading the network of `folder`/large takes of the host's memory."""
    fabric = launch("cpu", strategy)
    run = start(fabric, folder / "large", torch.bfloat16)
    before = in_memory()
    gpt = build(run, "lora", LoRA())
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


def run_out_of_memory(fabric: Fabric, folder: Path, strategy: str) -> None:
    """On a pretended GPU, whose memory ends in the backward pass of a block: of the first process only, under DDP.
    Planning is agreed on, and leaves nothing behind."""
    run = start(fabric, folder)
    gpt = build(run, "full")
    fabric.setup_module(gpt)
    mlp, mlp_forward = gpt.blocks[1].mlp, gpt.blocks[1].mlp.forward
    fails = lambda: gpt.recompute == 0 and (run.rank == 0 or strategy != "ddp")  # noqa: E731
    mlp.forward = lambda x: OutOfMemory.apply(mlp_forward(x)) if fails() else mlp_forward(x)
    cuda = torch.cuda
    cuda.mem_get_info, cuda.memory_reserved = lambda device: (2**30, 2**30), lambda device: 0
    cuda.max_memory_allocated, cuda.set_per_process_memory_fraction = lambda: 1000, lambda fraction, device: None
    model.Offload = lambda device: None
    cuda.empty_cache = cuda.reset_peak_memory_stats = cuda.synchronize = lambda: None
    memory.plan(run, gpt, [examples(8)], share=True)
    assert gpt.recompute == len(gpt.blocks) - 1
    idx, packed = pack(examples(8), 4096)[0]
    fabric.backward(gpt(idx, packed))
    assert all(p.grad is not None for p in gpt.parameters())
    assert strategy == "ddp" or all(isinstance(block.mlp.up_proj.weight, DTensor) for block in gpt.blocks)


def compute_all(folder: Path, strategy: str, out: Path) -> None:
    fabric = launch("cpu", strategy)
    computed = {}
    for family, name, kind, n in CASES if fabric.world_size < 4 else OF_FOUR:
        run = start(fabric, folder / family, quantize=kind, out_dir=out.parent / out.stem / family)
        if fabric.is_global_zero:
            run.options.out_dir.mkdir(parents=True, exist_ok=True)
        fabric.barrier()
        run.train_examples = examples(n)
        run.row_tokens = 70  # more rows than processes, which do not divide evenly
        computed[family, name, kind, n] = compute(run, name)
    if fabric.world_size == 2:
        run_out_of_memory(fabric, folder / "llama", strategy)
    if fabric.is_global_zero:
        torch.save(computed, out)


if __name__ == "__main__":
    atexit.register(no_thread_of_gloo_is_left)  # the first to register is the last to run
    job = read_slices if sys.argv[3].endswith("slices") else compute_all
    job(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
