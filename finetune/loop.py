"""The training loop. One for all methods: it trains whatever requires gradients, and does not ask what that is.

To hack it for one method, copy `fit` into that method's script. What a run starts from is in setup.py, what it
prints and writes in report.py, how it fits into a GPU's memory in memory.py.
"""

import math
import shlex
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune import memory
from finetune.report import Log, Meter, Step, closing_line, n_parameters, peak_memory
from finetune.setup import Run, Train, compiles
from lit_model import classify, hub
from lit_model.checkpoint import fingerprint_of, is_base, save_method
from lit_model.examples import render
from lit_model.generate import generate
from lit_model.model import GPT, Config
from lit_model.packing import Example, Packed, pack


@dataclass
class Summary:
    """What a run took and gave."""

    n_trained: int
    n_total: int
    seconds: float
    """of training, without evaluations"""
    n_tokens: int
    peak_gib: float
    val_loss: float


class Diverged(ValueError):
    """A loss or a gradient is not finite."""


LearningRateScale = Callable[[str, Config], float]  # of a trained tensor, by its name


def the_same(name: str, config: Config) -> float:
    """One learning rate for all."""
    return 1.0


def fit(
    run: Run,
    gpt: GPT,
    method: str,
    method_options: Any = None,
    share: bool = True,
    lr_scale: LearningRateScale = the_same,
) -> Summary:
    """Trains what requires gradients in `gpt` and writes `options.out_dir`.

    The loss of a step is the sum over all target tokens of its examples divided by their number: the same as example by
    example, however they are packed into rows.

    Args:
        method, method_options: written into the file of trained tensors, so that `lit_model.load` can build it again.
        share: compute what examples begin with once; not with dropout.
        lr_scale: what the learning rate of a trained tensor is multiplied by.
    """
    options, train = run.options, run.options.train
    steps_per_epoch = math.ceil(len(run.train_examples) / train.batch_size)
    n_steps = min(steps_per_epoch * train.epochs, train.max_steps or math.inf)
    warmup = n_steps // 10 if train.warmup_steps is None else train.warmup_steps
    interval = train.eval_interval or math.ceil(n_steps / 2)
    if warmup >= n_steps:
        raise ValueError(f"train.warmup_steps is {warmup}, but the run has {n_steps} steps")
    gpt.check_length(*(len(e.ids) for e in run.train_examples + run.val_examples))

    header = (method, method_options, fingerprint_of(options.checkpoint_dir))
    n_trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    n_total = n_parameters(gpt.config) + sum(
        p.numel() for name, p in gpt.named_parameters() if p.requires_grad and not is_base(name)
    )
    print(f"{method}: {n_trained:,} of {n_total:,} parameters ({100 * n_trained / n_total:.2f} %) are trained")
    print(f"{len(run.train_examples)} examples, {n_steps} steps of {train.batch_size}, {run.device.type}, {run.dtype}")
    run, network, optimizer, plan = prepare(run, gpt, share, lr_scale)
    if plan:
        print(plan.report)

    saved, stale, underway, meter = False, 0, deque(), Meter(run.device)
    stream = ahead(with_rows(batches(run.train_examples, train), gpt, run, share))
    with closing(Log(options)) as log, tqdm(total=n_steps, desc=method, unit="step", dynamic_ncols=True) as bar:
        first = best = evaluate(network, gpt, run)
        first_verdict = best_verdict = judge(gpt, run)
        log.write(step=0, val_loss=first, accuracy=first_verdict and first_verdict.accuracy)
        if run.val_examples:
            bar.write(f"before: validation loss {first:.4f}{_and(first_verdict)}")
        sample(gpt, run)
        meter.start()
        for number, (batch, rows) in zip(range(1, n_steps + 1), stream):
            step = Step(number, learning_rate(number, n_steps, warmup, train), batch)
            meter.mark()
            try:
                train_step(run, network, optimizer, step, rows)
            except torch.OutOfMemoryError:
                raise ValueError(f"out of memory at step {number}: {plan.advice}") from None
            meter.mark()
            underway.append(step)

            last = number == n_steps or (train.max_time is not None and meter.seconds() >= 60 * train.max_time)
            pause = last or number % interval == 0
            while len(underway) > (0 if pause else meter.lag):
                done = underway.popleft()
                loss, norm = done.receive()
                if not math.isfinite(loss + norm):
                    what = f"loss {loss}, gradient norm {norm} at step {done.number}"
                    raise Diverged(f"{what}: try a lower train.lr; {_kept(run, saved)}")
                meter.count(done)
                epoch, speed = done.number / steps_per_epoch, meter.n_tokens / meter.seconds()
                values = dict(epoch=epoch, loss=loss, lr=done.lr, grad_norm=norm, tokens=meter.n_tokens)
                log.write(step=done.number, **values, tokens_per_second=speed)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{done.lr:.1e}", tok_s=f"{speed:.0f}", refresh=False)
                bar.update()

            if pause:
                meter.pause()
                val_loss, verdict = evaluate(network, gpt, run), judge(gpt, run)
                if run.val_examples and not math.isfinite(val_loss):
                    what = f"validation loss {val_loss} after step {number}"
                    raise Diverged(f"{what}: try a lower train.lr; {_kept(run, saved)}")
                log.write(step=number, val_loss=val_loss, accuracy=verdict and verdict.accuracy)
                if run.val_examples:
                    bar.write(f"step {number}: validation loss {val_loss:.4f}{_and(verdict)}")
                sample(gpt, run)
                log.write_settings()
                save_method(options.out_dir / "last.safetensors", gpt, *header, run.task, options.quantize)
                stale += 1
                if not saved or val_loss < best or not run.val_examples:
                    saved, best, best_verdict, stale = True, val_loss, verdict, 0
                    save_method(options.out_dir / "lit_method.safetensors", gpt, *header, run.task, options.quantize)
                if last or (train.patience and stale >= train.patience):
                    break
                meter.start()
    if run.val_examples:
        print(f"validation loss: {first:.4f} before, {best:.4f} after (best)")
    if best_verdict:
        print(f"before: {first_verdict}\nafter: {best_verdict}, see {options.out_dir}/confusion.png")
        best_verdict.draw(options.out_dir / "confusion.png")
    print(closing_line(gpt, meter, run.device))
    words = ["--method_dir", str(options.out_dir)]
    words += ["--data", "test.csv"] if run.task else ["--prompt", train.sample or Train.sample]
    if options.checkpoint_dir.absolute() != hub.DEMO_CHECKPOINT:
        words = ["--checkpoint_dir", str(options.checkpoint_dir), *words]
    print(f"saved {options.out_dir}/: lit_method.safetensors, last.safetensors, hparams.yaml, metrics.csv, loss.png")
    print(f"try:  python {'scripts/eval_data.py' if run.task else 'generate/base.py'} {shlex.join(words)}")
    return Summary(n_trained, n_total, meter.seconds(), meter.n_tokens, peak_memory(run.device), best)


def prepare(
    run: Run, gpt: GPT, share: bool = True, lr_scale: LearningRateScale = the_same
) -> tuple[Run, nn.Module, torch.optim.Optimizer, memory.Plan | None]:
    """Compiles the network where that pays, makes the optimizer, and finds rows that fit into the GPU's memory.

    Returns the run with these rows; the network as Fabric wraps it, to be called where gradients are wanted; the
    optimizer; and how it fits, None on a CPU.
    """
    options, train = run.options, run.options.train
    if compiles(options, gpt.config, run.device):
        gpt.compile()
    network, optimizer = run.fabric.setup(gpt, make_optimizer(gpt, train, lr_scale))
    if run.device.type != "cuda":
        return run, network, optimizer, None
    some = list(islice(batches(run.train_examples, train), 8))
    with torch.random.fork_rng([run.device]):
        plan = memory.plan(gpt, run.fabric.backward, some, run.row_tokens, share, options.memory_gb)
    return replace(run, row_tokens=plan.row_tokens), network, optimizer, plan


def train_step(
    run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, step: Step, rows: list[tuple[Tensor, Packed]]
) -> None:
    """One update of what is trained, with a batch packed into `rows`. `step` receives its loss and gradient norm."""
    loss = torch.zeros((), device=run.device)
    step.n_computed = sum(len(packed.pos) for _, packed in rows)
    for idx, packed in rows:
        idx, packed = idx.to(run.device, non_blocking=True), packed.to(run.device)
        row_loss = network(idx, packed) / step.n_targets
        run.fabric.backward(row_loss)
        loss += row_loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = step.lr * group["lr_scale"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, run.options.train.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    step.send(loss, norm)


def make_optimizer(gpt: GPT, train: Train, lr_scale: LearningRateScale = the_same) -> torch.optim.Optimizer:
    """AdamW over what requires gradients; only matrices decay."""
    groups = defaultdict(list)
    for name, p in gpt.named_parameters():
        if p.requires_grad:
            groups[train.weight_decay if p.ndim > 1 else 0.0, lr_scale(name, gpt.config)].append(p)
    settings = [dict(params=params, weight_decay=d, lr=train.lr * s, lr_scale=s) for (d, s), params in groups.items()]
    return torch.optim.AdamW(settings, betas=(0.9, 0.95), fused=True)


def batches(examples: Sequence[Example], train: Train) -> Iterator[list[Example]]:
    """Batches of `batch_size` examples for ever: each epoch a new order, each example once in it."""
    rng = np.random.default_rng(train.seed)
    while True:
        order = rng.permutation(len(examples))
        for start in range(0, len(order), train.batch_size):
            yield [examples[i] for i in order[start : start + train.batch_size]]


def with_rows(
    batches: Iterator[list[Example]], gpt: GPT, run: Run, share: bool
) -> Iterator[tuple[list[Example], list[tuple[Tensor, Packed]]]]:
    """Each batch and the rows that it is packed into."""
    for batch in batches:
        rows = pack(batch, run.row_tokens, gpt.n_virtual_tokens, gpt.n_virtual_keys, share)
        if trunk := run.trunk:
            rows = [(idx, replace(p, x=trunk.x[p.source], first_block=trunk.first_block)) for idx, p in rows]
        if run.device.type == "cuda":  # a copy from other memory would hold up the host
            rows = [(idx.pin_memory(), packed.pin_memory()) for idx, packed in rows]
        yield batch, rows


def ahead(items: Iterator, n: int = 2) -> Iterator:
    """The same items, made n ahead in a thread."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items) for _ in range(n))
        while True:
            waiting.append(thread.submit(next, items))
            yield waiting.popleft().result()


def learning_rate(step: int, n_steps: int, warmup: int, train: Train) -> float:
    """At step 1 to n_steps: linear up to lr in the first `warmup` steps, then half a cosine down towards min_lr."""
    if step <= warmup:
        return train.lr * step / warmup
    progress = (step - 1 - warmup) / (n_steps - warmup)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(network: nn.Module, gpt: GPT, run: Run) -> float:
    """Mean loss over all target tokens of the whole validation set; NaN if there is none."""
    if not run.val_examples:
        return math.nan
    network.eval()
    rows = pack(run.val_examples, run.row_tokens, gpt.n_virtual_tokens, gpt.n_virtual_keys)
    with torch.compiler.set_stance("force_eager"):  # compiling for a few rows takes longer than it saves
        total = sum(network(idx.to(run.device), packed.to(run.device)) for idx, packed in rows)
    network.train()
    return total.item() / sum(e.n_targets for e in run.val_examples)


def judge(gpt: GPT, run: Run) -> classify.Verdict | None:
    """How many validation rows are told apart, where the task is that."""
    if run.task is None or not run.val_examples:
        return None
    labels = classify.label_ids(run.task, run.tokenizer)
    gpt.eval()
    with torch.compiler.set_stance("force_eager"):
        verdict = classify.judge(gpt, run.val_examples, run.task, labels, run.row_tokens)
    gpt.train()
    return verdict


def _kept(run: Run, saved: bool) -> str:
    before = "the best" if run.val_examples else "the last that was saved"
    return f"{run.options.out_dir} keeps {before} before it" if saved else "nothing was saved yet"


def _and(verdict: classify.Verdict | None) -> str:
    return f", {verdict}" if verdict else ""


def sample(gpt: GPT, run: Run) -> None:
    """Prints the answer to `train.sample`, the likeliest token each time."""
    instruction = run.options.train.sample
    if not instruction or run.task is not None:
        return
    bos = [] if run.tokenizer.bos_id is None else [run.tokenizer.bos_id]
    ids = bos + run.tokenizer.encode(render(run.options.prompt.style, instruction, tokenizer=run.tokenizer))
    gpt.eval()
    with torch.compiler.set_stance("force_eager"):  # the shapes of decoding are not worth compiling for one answer
        tokens = list(generate(gpt, ids, max_new_tokens=64, temperature=0, stop_ids=run.tokenizer.stop_ids))
    gpt.train()
    tqdm.write(f"  {instruction}\n  -> {' '.join(run.tokenizer.decode(tokens).split())}")
