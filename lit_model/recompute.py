"""Less memory for more time: keep only the input of a block, and run the block again when its gradient is wanted
(activation checkpointing, https://arxiv.org/abs/1604.06174).

Of LLaMA-7B's 32 blocks this keeps 0.25 MiB a token instead of 3. The forward pass is computed twice: half as much again
where the weights are frozen, a third in full finetuning. With `Offload` not even the inputs stay on the GPU: they
travel to the host's memory and back while the GPU works on other blocks. In a long row what an MLP holds inside is the
largest part of a block: `in_tiles` computes it for some tokens at a time.

finetune/memory.py finds out how many blocks it takes.
"""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

TILE = 4096  # tokens
PIECE = 2**30  # bytes of the host's memory: torch takes the next power of two for what it pins


class Offload:
    """Of one forward and backward pass: takes the blocks' inputs to the host, and gets them back, last one first."""

    def __init__(self, device: torch.device):
        self.copying = torch.cuda.Stream(device)
        self.away: list[list[Tensor]] = []  # in the host's memory, in pieces
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}  # index in `away` -> copy, and when it is there
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # their memory is in use until they are gone

    def take(self, x: Tensor) -> int | Tensor:
        if not x.is_cuda:  # an empty tensor that torch.utils.checkpoint keeps for itself
            return x
        self.copying.wait_stream(torch.cuda.current_stream())
        parts = x.split(PIECE // x[0].nbytes)
        host = [torch.empty(part.shape, dtype=x.dtype, pin_memory=True) for part in parts]
        with torch.cuda.stream(self.copying):
            for to, part in zip(host, parts, strict=True):
                to.copy_(part, non_blocking=True)
            self.leaving.append((x, self.copying.record_event()))
        self._let_go(2)
        self.away.append(host)
        return len(self.away) - 1

    def fetch(self, item: int | Tensor) -> Tensor:
        if isinstance(item, Tensor):
            return item
        self._let_go(0)
        if item not in self.coming:
            self._begin(item)
        x, arrived = self.coming.pop(item)
        torch.cuda.current_stream().wait_event(arrived)
        if item:
            self._begin(item - 1)  # the one that will be wanted next
        return x

    def _let_go(self, n: int) -> None:
        """Frees the memory of all but the last n tensors that left, as soon as they are on the host."""
        while len(self.leaving) > n:
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[1])

    def _begin(self, index: int) -> None:
        """Without `record_stream`: it would keep this memory from its next user until the GPU has come so far, and the
        host is many blocks ahead. Whoever gets it next does so after `fetch` has waited for the copy."""
        host = self.away[index]
        shape = sum(map(len, host)), *host[0].shape[1:]
        x = torch.empty(shape, dtype=host[0].dtype, device=self.copying.device)
        self.copying.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(self.copying):
            for to, part in zip(x.split(len(host[0])), host, strict=True):
                to.copy_(part, non_blocking=True)
            self.coming[index] = x, self.copying.record_event()


def recomputed(block: nn.Module, x: Tensor, row: object, offload: Offload | None) -> Tensor:
    """block(x, row), of which only x is kept for the backward pass, and with `offload` not on the GPU."""
    if not x.requires_grad and not any(p.requires_grad for p in block.parameters()):
        return block(x, row)  # below what is trained: nothing is kept at all
    with saved_tensors_hooks(offload.take, offload.fetch) if offload else nullcontext():
        return checkpoint(block, x, row, use_reentrant=False)


@torch.compiler.disable
def in_tiles(feed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """feed(x), (T, C), for TILE tokens at a time: of each only the input is kept."""
    return torch.cat([checkpoint(feed, part, use_reentrant=False) for part in x.split(TILE)])
