"""Several GPUs, on one machine or many: lightning-fabric starts the processes, PyTorch keeps them in step.

ddp   each process holds the whole network; gradients of what is trained are summed
      (DistributedDataParallel, https://arxiv.org/abs/2006.15704)
fsdp  each holds a slice of every matrix, of its gradient and of what AdamW keeps; a block is gathered when it is
      computed (FSDP2, `fully_shard`, https://arxiv.org/abs/2304.11277)

Every process packs the same batch into the same rows and computes its share of them, so that a step is the same however
many there are: the loss is divided by the target tokens of the whole batch.
"""

import atexit
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial, partialmethod
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lit_model.load import is_base
from lit_model.model import GPT, Linear

Strategy = Literal["auto", "ddp", "fsdp", "fsdp_offload"]
TIMEOUT = timedelta(minutes=10)  # that a process waits for the others, who may be writing files


def launch(devices: str, strategy: Strategy) -> Fabric:
    """Starts the processes that `--devices` asks for, or joins those that torchrun, fabric run or SLURM have started.

    Returns in each of them. Raises ValueError if there are fewer GPUs, or a launcher has started other numbers.
    """
    kind, _, number = devices.rpartition(":") if ":" in devices or devices.isdigit() else (devices, "", "")
    if kind not in ("", "auto", "cpu") or (number and not (number.isdigit() and int(number))):
        raise ValueError(f"--devices is {devices!r}; it must be auto, cpu, a number of GPUs, or cpu: and a number")
    started, machines = _started()
    n = int(number or started or 1)
    world = n * machines
    launched = int(os.environ.get("WORLD_SIZE", world))
    if launched != world or (started and n != started):
        raise ValueError(f"--devices {devices} makes {world} processes, but {launched} were started: omit it")
    if kind != "cpu" and n > 1 and n > torch.cuda.device_count():
        raise ValueError(f"--devices {n}, but this machine has {torch.cuda.device_count()} GPUs (cpu:{n} needs none)")
    how: Any = "auto"
    if strategy.startswith("fsdp"):
        offload = strategy == "fsdp_offload" and kind != "cpu" and torch.cuda.is_available()
        settings = dict(data_parallel_size=world, tensor_parallel_size=1, timeout=TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if offload else None  # the norm of what waits on the host is summed there
        how = ModelParallelStrategy(partial(shard, offload=offload), process_group_backend=backend, **settings)
    elif world > 1:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # Lightning wraps on another stream
        how = DDPStrategy(timeout=TIMEOUT, gradient_as_bucket_view=True)
    accelerator = "cpu" if kind == "cpu" else "auto"
    fabric = Fabric(accelerator=accelerator, devices=n, num_nodes=machines, strategy=how, precision="32-true")
    atexit.register(leave, fabric)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # not a banner of each process
    logging.getLogger("lightning_fabric.strategies.launchers").setLevel(logging.INFO)  # but that one of them has ended
    parent = os.getppid()
    if "LT_CLI_USED" not in os.environ:  # fabric run: it has joined the others already
        fabric.launch()
    if not fabric.is_global_zero:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        if not started:
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    return fabric


def leave(fabric: Fabric) -> None:
    """Ends the threads of gloo before Python does: one that still frees a tensor then would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        if isinstance(fabric.strategy, ModelParallelStrategy):  # which torch's caches refer to for ever
            getattr(fabric.strategy.device_mesh, "_pg_registry", {}).clear()
        gc.collect()  # they end with the last reference to their group


def _started() -> tuple[int | None, int]:
    """(processes that a launcher has started on this machine, number of machines)"""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun and fabric run
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        machines = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // machines, machines
    return None, 1


def _end_with(parent: int) -> None:
    """The first process watches those that it has started; this is how they watch it."""
    while os.getppid() == parent:
        time.sleep(2)
    print("the first process of this run is gone, and this one ends with it", file=sys.stderr)
    os._exit(1)


def total(t: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum over all processes, or what else `op` makes of theirs, in place; without waiting for the GPU."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(t, op)
    return t


def highest(value: float, device: torch.device) -> float:
    """The highest of all processes."""
    return total(torch.tensor(value, dtype=torch.float64, device=device), dist.ReduceOp.MAX).item()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, on each of them."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def local(t: Tensor) -> Tensor:
    """The slice that this process has of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """The tensor in one piece; all processes call this together."""
    return t.full_tensor() if isinstance(t, DTensor) else t


@torch.no_grad()
def fill(t: Tensor, values: Tensor) -> None:
    """Copies whole `values` into a tensor, or into the slice that this process has of it (cut as FSDP2 cuts)."""
    if isinstance(t, DTensor):
        parts = values.chunk(t.device_mesh.size())
        rank = t.device_mesh.get_local_rank()
        values = parts[rank] if rank < len(parts) else values[:0]
    local(t).copy_(values)


def shard(gpt: GPT, mesh: DeviceMesh, offload: bool) -> GPT:
    """Leaves each process its slice of every matrix of the base, on its device or (offload) in the host's memory.

    What is small stays whole everywhere, since slices of it would save next to nothing: vectors, what a method adds
    (`sum_gradients` adds up the gradients of these), and quantized weights. The network may lie in a mapped file: of
    that only the slices are read. What is trained becomes float32.
    """
    own = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    device = torch.device("cpu") if offload else own
    quantized = {p for m in gpt.modules() if isinstance(m, Linear) and m.weight is None for p in m.parameters(False)}
    source: dict[str, nn.Parameter] = {}
    for name, p in list(gpt.named_parameters()):
        dtype = torch.float32 if p.requires_grad else gpt.dtype
        if p not in quantized and p.ndim > 1 and is_base(name):
            t, source[name] = torch.empty_like(p, device="meta", dtype=dtype), p
        else:
            t = p.detach().to(own, None if p in quantized else dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(gpt.get_submodule(owner), leaf, nn.Parameter(t, requires_grad=p.requires_grad))
    gpt.tie()
    in_one_piece = {p for p in gpt.parameters() if not p.is_meta}
    for module in gpt.modules():  # such as a LoRA's start
        module._buffers |= {name: b.to(own) for name, b in module._buffers.items() if b is not None}
    # where base weights are trained in float32, blocks are gathered in the dtype that they compute in
    trains_base = any(p.requires_grad for p in source.values())
    mixed = MixedPrecisionPolicy(gpt.dtype, torch.float32, cast_forward_inputs=False)
    settings = dict(
        mesh=mesh["data_parallel"],
        ignored_params=in_one_piece,
        mp_policy=mixed if trains_base else MixedPrecisionPolicy(),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        reshard_after_forward=True,  # by default what lies in no block stays gathered after an evaluation
    )
    for module in (*gpt.blocks, gpt):
        fully_shard(module, **settings)
    gpt._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # to_empty, of the slices only
    for name, p in gpt.named_parameters():
        if name in source:
            fill(p, source[name].detach())
    return gpt


def sum_gradients(trained: Sequence[nn.Parameter]) -> None:
    """Beside FSDP: the mean over all processes of the gradients of what each has whole, as FSDP has it of the rest."""
    grads = [p.grad for p in trained if not isinstance(p, DTensor)]
    if grads:
        flat = total(torch.cat([g.flatten() for g in grads])) / dist.get_world_size()
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])


def clip(trained: Sequence[nn.Parameter], most: float) -> Tensor:
    """Cuts the whole gradient to a norm. Returns the norm that it had."""
    parts = [[p for p in trained if isinstance(p, DTensor) == spread] for spread in (False, True)]
    if not parts[1]:
        return nn.utils.clip_grad_norm_(trained, most)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in part])) for part in parts if part]
    norm = torch.stack([t.to(norms[0].device) for t in norms]).norm()
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, most, norm)
    return norm
