"""The training loop. One for all methods: it trains whatever requires gradients, and does not ask what that is.

What a run starts from is in run.py, what it prints and writes in report.py, what it resumes from in state.py, how it
fits into a GPU's memory in memory.py.
"""

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune.devices import clip, local, sum_gradients, total
from finetune.report import Ask, Step, Summary, Watch, peak_memory
from finetune.run import Run, prepare
from lit_model import GPT, generate
from lit_model.data.examples import prompt_ids, render
from lit_model.files import copy_file
from lit_model.load import save_method
from lit_model.loss import cross_entropy
from lit_model.packing import Packed

Objective = Callable[[nn.Module, Tensor, Packed], Tensor]  # objective(head, x, row) -> scalar sum, see loss.py


def fit(
    run: Run,
    gpt: GPT,
    method: str,
    method_options: Any = None,
    objective: Objective = cross_entropy,
    lr_scale: Callable[[str], float] | None = None,
    share: bool = True,
) -> Summary:
    """Trains what requires gradients in `gpt` and writes `options.out_dir`; resumes the run that it holds. With
    `--dry_run` it only prints what that would need.

    To hack it for one method, copy these lines into its script. The loss of a step is the sum of the objective over all
    target tokens of its examples divided by their number: the same as example by example, however they are packed into
    rows and spread over processes.

    Args:
        method, method_options: written into the file of trained tensors, so that `lit_model.load` can build it again.
        objective: what is minimised, called inside `GPT.forward`.
        lr_scale: what the learning rate of a trained tensor is multiplied by, from its name; None: one rate for all.
        share: compute what examples begin with once; not with dropout.
    """
    gpt.objective = objective
    network, optimizer = prepare(run, gpt, share, lr_scale)
    if run.options.dry_run:
        return dry_run(run, gpt, network, optimizer, share)
    run.resume(gpt, optimizer)
    with Watch(run, method) as watch:  # bar, metrics.csv, TensorBoard, signals, clock
        if not run.progress.step:
            watch.evaluated(evaluate(run, network, gpt))
        for step, rows in ahead(run.steps(gpt, run.progress.step, share)):
            train_step(run, network, optimizer, step, rows)
            ask = watch.step(step)
            if step.evaluates or ask is Ask.OVER:
                is_best = watch.evaluated(evaluate(run, network, gpt))
                save(run, gpt, method, method_options, watch, is_best)
            if run.progress.is_finished:
                run.state.mark(run.progress)
                break
            if step.evaluates or ask:
                run.save_state(gpt, optimizer, watch)
            if ask >= Ask.STOP:
                break
    return watch.summary()


def train_step(
    run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, step: Step, rows: list[tuple[Tensor, Packed]]
) -> None:
    """One update of what is trained, with a batch packed into `rows`. Leaves loss and gradient norm in `step`."""
    step.loss = torch.zeros((), device=run.device)
    for i, (idx, packed) in enumerate(rows):
        waits = run.world > 1 and not run.sharded and i + 1 < len(rows)  # gradients of several rows are summed at once
        idx, packed = idx.to(run.device, non_blocking=True), packed.to(run.device)
        with run.fabric.no_backward_sync(network, enabled=waits):
            row_loss = network(idx, packed) / step.n_targets * packed.weight
            run.fabric.backward(row_loss * run.world if run.world > 1 else row_loss)  # DDP and FSDP average gradients
        step.loss += row_loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = step.lr * group["lr_scale"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if run.sharded:
        sum_gradients(trained)
    step.norm = clip(trained, run.options.train.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(run: Run, network: nn.Module, gpt: GPT) -> dict[str, float]:
    """Mean loss over all target tokens of the whole validation set, and what the task adds; {} without validation rows.
    Prints the answer to `train.sample`."""
    numbers = {}
    network.eval()
    with torch.compiler.set_stance("force_eager"):  # compiling for a few rows takes longer than it saves
        if run.val_examples:
            rows = run.rows(gpt, run.val_examples)
            losses = [network(idx.to(run.device), packed.to(run.device)) * packed.weight for idx, packed in rows]
            numbers["val_loss"] = total(sum(losses)).item() / sum(e.n_targets for e in run.val_examples)
        if run.val_examples and run.task:
            from lit_model.data import labels, score

            ids = labels.label_ids(run.task, run.tokenizer)
            run.verdict = score.judge(gpt, run.val_examples, run.task, ids, run.row_tokens)
            numbers |= dict(accuracy=run.verdict.accuracy, macro_f1=run.verdict.macro_f1)
        if run.options.train.sample and not run.task:
            answer_sample(run, gpt)
    network.train()
    return numbers


def answer_sample(run: Run, gpt: GPT) -> None:
    """Prints the answer to `train.sample`, the likeliest token each time."""
    instruction, tokenizer = run.options.train.sample, run.tokenizer
    style = run.options.examples.style
    ids = prompt_ids(tokenizer, style, render(style, instruction, tokenizer=tokenizer))
    stop_ids = () if run.sharded else tokenizer.stop_ids  # each pass is one of all processes: they make the same number
    if run.sharded:  # decode.py calls blocks, and what lies outside of them is gathered by the network's own forward
        gpt(torch.zeros(1, 1, dtype=torch.long, device=run.device))
        gpt.unshard()
    tokens = list(generate(gpt, ids, max_new_tokens=64, temperature=0, stop_ids=stop_ids))
    if run.sharded:
        gpt.reshard()
    tokens = takewhile(lambda token: token not in tokenizer.stop_ids, tokens)
    tqdm.write(f"  {instruction}\n  -> {' '.join(tokenizer.decode(list(tokens)).split())}")


def save(run: Run, gpt: GPT, method: str, method_options: Any, watch: Watch, is_best: bool) -> None:
    """Writes last.safetensors, and lit_method.safetensors if it is the best so far; for labels confusion.png, too."""
    out_dir = run.options.out_dir
    watch.log.write_settings()
    header = method, method_options, run.base.identity, run.task, run.options.quantize
    save_method(out_dir / "last.safetensors", gpt, *header, write=run.rank == 0)
    if is_best and run.rank == 0:
        copy_file(out_dir / "last.safetensors", out_dir / "lit_method.safetensors")
        if run.verdict:
            run.verdict.draw(out_dir / "confusion.png")


def ahead(items: Iterator, n: int = 2) -> Iterator:
    """The same items, made n ahead in a thread."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(n))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def dry_run(run: Run, gpt: GPT, network: nn.Module, optimizer: torch.optim.Optimizer, share: bool) -> Summary:
    """Prints what a run would need of memory, time and disk; three steps are measured, and nothing is written."""
    for step, rows in islice(run.steps(gpt, share=share), 3):  # the first one compiles, and fills caches
        began = time.perf_counter()
        train_step(run, network, optimizer, step, rows)
        step.norm.item()  # waits for the GPU
    seconds = (time.perf_counter() - began) * run.n_steps
    trained = [p for p in gpt.parameters() if p.requires_grad]
    n_local, n_whole = sum(local(p).numel() for p in trained), sum(p.numel() for p in trained)
    frozen = sum(local(p).nbytes for p in gpt.parameters() if not p.requires_grad)
    peak, gib = peak_memory(run.device), 2**30
    free = shutil.disk_usage(next(path for path in run.options.out_dir.absolute().parents if path.exists())).free
    print(f"what each of {run.world} processes would need:")
    print(f"  {frozen / gib:8.2f} GiB  frozen weights")
    print(f"  {16 * n_local / gib:8.2f} GiB  trained weights in float32, their gradients, AdamW's two moments")
    print(f"  {peak:8.2f} GiB  with everything else, measured")
    disk = f"{36 * n_whole / gib:.2f} more until then, {free / gib:.1f} are free"
    print(f"  {8 * n_whole / gib:8.2f} GiB of disk at the end, {disk}")
    print(f"  {seconds / 60:8.1f} minutes for {run.n_steps} steps, without evaluations")
    return Summary(*run.counted, seconds, 0, peak, math.nan)
