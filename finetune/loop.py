"""The training loop. One for all methods: it trains whatever requires gradients, and does not ask what that is.

To hack it for one method, copy `fit` into that method's script. What a run starts from is in setup.py, what it
prints and writes in report.py, how it fits into a GPU's memory in memory.py.
"""

import math
import shlex
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from finetune import dry_run, memory
from finetune.devices import clip, highest, sum_gradients, total
from finetune.interrupt import Asked, leave
from finetune.report import Log, Meter, Step, closing_line, n_parameters, peak_memory
from finetune.setup import Run, Train, compiles
from finetune.state import Progress
from lit_model import classify, hub
from lit_model.checkpoint import fingerprint_of, is_base, save_method
from lit_model.examples import render
from lit_model.files import copy_file
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
    """Trains what requires gradients in `gpt` and writes `options.out_dir`; goes on with the run that it holds.

    The loss of a step is the sum over all target tokens of its examples divided by their number: the same as example by
    example, however they are packed into rows and spread over processes.

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

    n_trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    n_total = n_parameters(gpt.config) + sum(
        p.numel() for name, p in gpt.named_parameters() if p.requires_grad and not is_base(name)
    )
    print(f"{method}: {n_trained:,} of {n_total:,} parameters ({100 * n_trained / n_total:.2f} %) are trained")
    device = f"{run.world} x {run.device.type}" if run.world > 1 else run.device.type
    print(f"{len(run.train_examples)} examples, {n_steps} steps of {train.batch_size}, {device}, {run.dtype}")
    run, network, optimizer, plan = prepare(run, gpt, share, lr_scale)
    if plan:
        print(plan.report)
    if options.dry_run:
        stream = with_rows(batches(run.train_examples, train), gpt, run, share)
        steps = (train_step(run, network, optimizer, Step(0, train.lr, batch), rows) for batch, rows in stream)
        dry_run.report(run, gpt, steps, n_steps)
        return Summary(n_trained, n_total, 0.0, 0, peak_memory(run.device), math.nan)
    header = (method, method_options, fingerprint_of(options.checkpoint_dir), run.task, options.quantize, run.rank == 0)

    if run.world > 1:  # up to here all have drawn the same numbers; dropout is to differ
        torch.manual_seed(train.seed + run.rank)
    meter, underway = Meter(run.device), deque()
    done = Progress()
    if run.state is not None:
        done = run.states.load(run.state, gpt, optimizer)
        vars(meter).update(done.meter)
        if done.saved and train.max_time is not None and meter.before >= 60 * train.max_time:
            print(f"this run has had its train.max_time of {train.max_time} minutes; a higher one goes on: {run.state}")
            sys.exit(0)
        print(f"going on after step {done.step}: {run.state}")
    stream = ahead(with_rows(islice(batches(run.train_examples, train), done.step, None), gpt, run, share))
    bar = tqdm(total=n_steps, initial=done.step, desc=method, unit="step", dynamic_ncols=True)
    with Asked(train, meter, run.rank) as asked, closing(Log(options, done.step, run.rank == 0)) as log, bar:

        def receive(n: int) -> tuple[bool, bool, bool]:
            """Takes what came of all steps but the last n. Returns what was asked for with them."""
            wanted = [False] * 3
            while len(underway) > n:
                step = underway.popleft()
                loss, norm, *flags = step.receive()
                wanted = [a or b > 0 for a, b in zip(wanted, flags)]
                if not math.isfinite(loss + norm) and train.nonfinite == "stop":
                    what = f"loss {loss}, gradient norm {norm} at step {step.number}"
                    raise Diverged(f"{what}: try a lower train.lr; {_kept(run, done.saved)}")
                if not math.isfinite(norm):
                    bar.write(f"step {step.number} is left out: loss {loss}, gradient norm {norm}")
                elif len(losses) == losses.maxlen and loss > 2 * sum(losses) / len(losses):
                    bar.write(f"step {step.number}: the loss of {loss:.3f} is more than twice that of the steps before")
                losses.append(loss)
                done.updates += math.isfinite(norm)
                meter.count(step)
                epoch, speed = step.number / steps_per_epoch, meter.n_tokens / meter.seconds()
                values = dict(epoch=epoch, loss=loss, lr=step.lr, grad_norm=norm, tokens=meter.n_tokens)
                log.write(step=step.number, **values, tokens_per_second=speed)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{step.lr:.1e}", tok_s=f"{speed:.0f}", refresh=False)
                bar.update()
            return tuple(wanted)

        def save_state(number: int) -> None:
            done.step, done.meter = number, {name: getattr(meter, name) for name in Meter.COUNTS}
            done.meter["before"] = highest(meter.seconds(), run.device)
            try:
                run.states.save(gpt, optimizer, done)
            except OSError as e:
                if train.full_disk == "stop" or asked.signal:
                    raise
                bar.write(f"{e}; going on")
            asked.saved_at = time.monotonic()

        losses = deque(maxlen=50)
        if not done.step:
            run.states.begin()
            done.first = done.best = evaluate(network, gpt, run)
            verdict = judge(gpt, run)
            done.first_verdict = done.best_verdict = verdict and asdict(verdict)
            log.write(step=0, val_loss=done.first, accuracy=verdict and verdict.accuracy)
            if run.val_examples:
                bar.write(f"before: validation loss {done.first:.4f}{_and(verdict)}")
            sample(gpt, run)
        meter.start()
        for number, (batch, rows) in zip(range(done.step + 1, n_steps + 1), stream):
            step = Step(number, learning_rate(number, n_steps, warmup, train), batch)
            meter.mark()
            try:
                train_step(run, network, optimizer, step, rows, asked)
            except torch.OutOfMemoryError:
                raise ValueError(f"out of memory at step {number}: {plan.advice}") from None
            meter.mark()
            underway.append(step)

            pause = number == n_steps or number % interval == 0
            stop, over, save = receive(0 if pause else meter.lag)
            if over or stop or save:
                stop = receive(0)[0] or stop
            if pause or over:
                meter.pause()
                val_loss, verdict = evaluate(network, gpt, run), judge(gpt, run)
                if run.val_examples and not math.isfinite(val_loss):
                    what = f"validation loss {val_loss} after step {number}"
                    raise Diverged(f"{what}: try a lower train.lr; {_kept(run, done.saved)}")
                log.write(step=number, val_loss=val_loss, accuracy=verdict and verdict.accuracy)
                if run.val_examples:
                    bar.write(f"step {number}: validation loss {val_loss:.4f}{_and(verdict)}")
                sample(gpt, run)
                log.write_settings()
                save_method(options.out_dir / "last.safetensors", gpt, *header)
                done.stale += 1
                if not done.saved or val_loss < done.best or not run.val_examples:
                    done.saved, done.best, done.stale = True, val_loss, 0
                    done.best_verdict = verdict and asdict(verdict)
                    if run.rank == 0:
                        copy_file(options.out_dir / "last.safetensors", options.out_dir / "lit_method.safetensors")
                if number == n_steps or (train.patience and done.stale >= train.patience):
                    run.states.finish(number)
                    break
                if over:
                    save_state(number)
                    break
                meter.start()
            if pause or save or stop:
                save_state(number)
            if stop:
                leave(asked.signal or signal.SIGTERM, number, run.rank)
    if left_out := number - done.updates:
        print(f"{left_out} of {number} steps were left out: their gradients were not finite")
    if run.val_examples:
        worse = "; that is worse: try a lower train.lr, or train longer" if done.best > done.first else ""
        print(f"validation loss: {done.first:.4f} before, {done.best:.4f} after (best){worse}")
    if done.best_verdict:
        before, after = classify.Verdict(**done.first_verdict), classify.Verdict(**done.best_verdict)
        print(f"before: {before}\nafter: {after}, see {options.out_dir}/confusion.png")
        if run.rank == 0:
            after.draw(options.out_dir / "confusion.png")
    print(closing_line(gpt, meter, run.device, run.world))
    words = ["--method_dir", str(options.out_dir)]
    words += ["--data", "test.csv"] if run.task else ["--prompt", train.sample or Train.sample]
    if options.checkpoint_dir.absolute() != hub.DEMO_CHECKPOINT:
        words = ["--checkpoint_dir", str(options.checkpoint_dir), *words]
    print(f"saved {options.out_dir}/: lit_method.safetensors, last.safetensors, hparams.yaml, metrics.csv, loss.png")
    print(f"try:  python {'scripts/eval_data.py' if run.task else 'generate/base.py'} {shlex.join(words)}")
    return Summary(n_trained, n_total, meter.seconds(), meter.n_tokens, peak_memory(run.device), done.best)


def prepare(
    run: Run, gpt: GPT, share: bool = True, lr_scale: LearningRateScale = the_same
) -> tuple[Run, nn.Module, torch.optim.Optimizer, memory.Plan | None]:
    """Compiles the network where that pays, spreads it over the devices, makes the optimizer, and finds rows that fit
    into the GPU's memory.

    Returns the run with these rows; the network as Fabric wraps it, to be called where gradients are wanted; the
    optimizer; and how it fits, None on a CPU.
    """
    options, train = run.options, run.options.train
    if compiles(options, gpt.config, run.device):
        gpt.compile()
    if run.world > 1 and not run.sharded:  # every process has read the frozen ones from the same file
        frozen = [name for name, p in gpt.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(gpt, frozen)
    network = run.fabric.setup_module(gpt)
    optimizer = run.fabric.setup_optimizers(make_optimizer(gpt, train, lr_scale))
    if run.device.type != "cuda":
        return run, network, optimizer, None
    some = list(islice(batches(run.train_examples, train), 8))
    with torch.random.fork_rng([run.device]):
        plan = memory.plan(
            gpt, run.fabric.backward, some, run.row_tokens, share, options.memory_gb, run.world, run.device
        )
    return replace(run, row_tokens=plan.row_tokens), network, optimizer, plan


def train_step(
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    rows: list[tuple[Tensor, Packed]],
    asked: Asked | None = None,
) -> None:
    """One update of what is trained, with a batch packed into `rows`. `step` receives its loss and gradient norm, and
    what the processes are asked for."""
    loss = torch.zeros((), device=run.device)
    for i, (idx, packed) in enumerate(rows):
        waits = run.world > 1 and not run.sharded and i + 1 < len(rows)  # gradients of several rows are summed at once
        idx, packed = idx.to(run.device, non_blocking=True), packed.to(run.device)
        with run.fabric.no_backward_sync(network, enabled=waits):
            row_loss = network(idx, packed) / step.n_targets
            if not packed.counts:
                row_loss = row_loss * 0.0
            run.fabric.backward(row_loss * run.world if run.world > 1 else row_loss)  # they take the mean
        loss += row_loss.detach()
    own = [packed for _, packed in rows if packed.counts]
    step.n_computed, step.n_own_targets = sum(len(p.pos) for p in own), sum(len(p.targets) for p in own)
    for group in optimizer.param_groups:
        group["lr"] = step.lr * group["lr_scale"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if run.sharded:
        sum_gradients(trained)
    norm = clip(trained, run.options.train.grad_clip or math.inf)
    if run.options.train.nonfinite == "stop" or norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    others = asked.now(loss) if asked else loss.new_zeros(0)
    values = total(torch.cat((loss[None], others)))
    step.send(torch.cat((values[:1], norm.to(run.device)[None], values[1:])))


def make_optimizer(gpt: GPT, train: Train, lr_scale: LearningRateScale = the_same) -> torch.optim.Optimizer:
    """AdamW over what requires gradients; only matrices decay."""
    groups = defaultdict(list)
    for name, p in gpt.named_parameters():
        if p.requires_grad:
            decay, spread = train.weight_decay if p.ndim > 1 else 0.0, isinstance(p, DTensor)
            groups[decay, lr_scale(name, gpt.config), spread].append(p)
    settings = (dict(params=group, weight_decay=d, lr=train.lr * s, lr_scale=s) for (d, s, _), group in groups.items())
    return torch.optim.AdamW(list(settings), betas=(0.9, 0.95), fused=True)


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
        rows = pack(batch, run.row_tokens, gpt.n_virtual_tokens, gpt.n_virtual_keys, share, run.rank, run.world)
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
    virtual = gpt.n_virtual_tokens, gpt.n_virtual_keys
    rows = pack(run.val_examples, run.row_tokens, *virtual, rank=run.rank, world=run.world)
    with torch.compiler.set_stance("force_eager"):  # compiling for a few rows takes longer than it saves
        own = sum(network(idx.to(run.device), packed.to(run.device)) * packed.counts for idx, packed in rows)
    network.train()
    return total(own).item() / sum(e.n_targets for e in run.val_examples)


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
    tokenizer = run.tokenizer
    ids = tokenizer.bos + tokenizer.encode(render(run.options.prompt.style, instruction, tokenizer=tokenizer))
    gpt.eval()
    with torch.compiler.set_stance("force_eager"):  # the shapes of decoding are not worth compiling for one answer
        stop_ids = () if run.sharded else tokenizer.stop_ids  # each pass is one of all processes: they make as many
        tokens = list(generate(gpt, ids, max_new_tokens=64, temperature=0, stop_ids=stop_ids))
    gpt.train()
    tokens = takewhile(lambda token: token not in tokenizer.stop_ids, tokens)
    tqdm.write(f"  {instruction}\n  -> {' '.join(tokenizer.decode(list(tokens)).split())}")
