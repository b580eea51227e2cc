"""What a run starts from: its options, the data as tokens, the devices, and the network with a method in it."""

import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from finetune import memory
from finetune.devices import Strategy, launch
from finetune.report import Step, Watch, n_parameters
from finetune.state import Progress, State, identity, may_differ, read_state, state_file
from lit_model import GPT
from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions, marked, parts, validate_options
from lit_model.data.tokenizer import Tokenizer
from lit_model.files import reading, refuse_used
from lit_model.load import METHODS, empty_network, install_method, is_base, load_base, read_method
from lit_model.methods.tokens import Tokens, add_tokens, init_from_base
from lit_model.packing import Example, Packed, pack
from lit_model.weights import demo
from lit_model.weights.folder import Folder

if TYPE_CHECKING:
    from lit_model.data.labels import Task, Verdict


@dataclass
class Train:
    """How it is trained."""

    lr: float = 1e-3
    """highest learning rate of AdamW; a cosine takes it to 0"""
    epochs: int = 1
    """passes over the training rows, each in a new order"""
    batch_size: int = 16
    """examples per optimizer step, however many rows and devices they are spread over; a conversation is one"""
    max_steps: int | None = None
    """end after this many optimizer steps"""
    max_time: float | None = may_differ(None)
    """end after this many minutes of training"""
    max_examples: int | None = None
    """train on this many rows only; null: all, and 480 for the demo data on a CPU"""
    eval_interval: int | None = None
    """steps between two evaluations; null: two in the run, halfway and at the end"""
    patience: int = 0
    """end after this many evaluations in a row without a better validation loss; 0: never"""
    warmup_steps: int | None = None
    """steps in which the learning rate rises from 0; null: a tenth of all steps"""
    weight_decay: float = 0.02
    """for matrices only: gates, norms, biases and other vectors never decay"""
    grad_clip: float = 1.0
    """largest norm of the whole gradient; 0: no limit"""
    row_tokens: int | None = may_differ(None)
    """approximate most tokens of a packed row, which is one pass through the network; examples are never cut to fit;
    null: 4096 on a CPU; on a GPU 16384, and fewer if its memory demands it"""
    seed: int = 0
    """seed of the validation split, the order of the rows, initial values and dropout"""
    sample: str = may_differ("Give three tips for staying healthy.")
    """instruction that is answered at the start and at every evaluation; empty: none"""


@dataclass
class RunOptions:
    """Options that all methods share."""

    checkpoint_dir: Path = may_differ(demo.DEMO_CHECKPOINT)
    """Hugging Face folder of the base network; default: the demo's SmolLM2-135M-Instruct, fetched once"""
    data: str = may_differ(str(demo.DEMO_DATA))
    """file of rows with instruction, input and output, or of another kind (docs/data.md): .json, .jsonl, .csv,
    .tsv or .txt, also as .gz, or .parquet; or owner/name on the Hub; several with weights: a.json,b.json:0.5; default:
    999 Alpaca rows, fetched once"""
    val_data: Path | None = may_differ(None)
    """file of the validation rows; null: a share of the others, examples.val_fraction"""
    out_dir: Path = may_differ(Path("out/finetune"))
    """folder for the trained tensors, the loss curve and the settings of the run"""
    train: Train = field(default_factory=Train)
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    tokens: Tokens = field(default_factory=Tokens)
    head: Literal["labels", "linear"] = "labels"
    """for rows of text and label: labels, predict the label as text; linear, train a classification layer"""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """form of the frozen base weights: nf4 (QLoRA) or int8 for little memory, fp8 for speed on an H100"""
    devices: str = may_differ("auto")
    """auto: one GPU if there is one, else the CPU; under torchrun or SLURM the processes that they started; a number of
    GPUs of this machine; cpu, or cpu:2 for two processes"""
    strategy: Strategy = may_differ("auto")
    """use of several devices: ddp, each holds the whole network; fsdp, each a slice of it; fsdp_offload, a slice in the
    host's memory; auto: ddp"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of the base weights and all activations; auto: bfloat16 on GPUs and CPUs that multiply it fast, else
    float32"""
    memory_gb: float | None = may_differ(None)
    """most GiB of a GPU's memory to use: to stay below it, rows get shorter, then activations, then whole blocks are
    recomputed, then their inputs move to the host's memory; null: all that is free"""
    overwrite: bool = may_differ(False)
    """replace the run that out_dir holds; otherwise it is resumed if it was interrupted"""
    init_from: Path | None = None
    """method folder to start from, ours or one of PEFT's; its options, such as a rank, are taken"""
    dry_run: bool = may_differ(False)
    """print what the run would need of memory, time and disk, measured in three steps, and write nothing"""


@dataclass
class Run:
    """What `start` has found out and `fit` works with."""

    options: RunOptions
    fabric: Fabric
    dtype: torch.dtype
    base: Folder
    tokenizer: Tokenizer
    train_examples: list[Example]
    val_examples: list[Example]
    row_tokens: int
    task: "Task | None"  # of rows with text and label
    state: State
    progress: Progress  # at first that of the run that out_dir holds
    verdict: "Verdict | None" = None  # of the last evaluation, for rows of text and label
    counted: tuple[int, int] = (0, 0)  # parameters that are trained, and all
    tokens: dict[str, int] = field(default_factory=dict)  # id of each token that options.tokens adds

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.fabric.world_size

    @property
    def sharded(self) -> bool:
        return isinstance(self.fabric.strategy, ModelParallelStrategy)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(not e.follows for e in self.train_examples) / self.options.train.batch_size)

    @cached_property
    def n_steps(self) -> int:
        train = self.options.train
        return min(self.steps_per_epoch * train.epochs, train.max_steps or sys.maxsize)

    def steps(self, gpt: GPT, after: int = 0, share: bool = True) -> Iterator[tuple[Step, list]]:
        """Each step after step `after`, and the rows of this process: (idx, packed), see `pack`."""
        train, n = self.options.train, self.n_steps
        interval = train.eval_interval or math.ceil(n / 2)
        warmup = min(n // 10 if train.warmup_steps is None else train.warmup_steps, n - 1)
        for number, batch in enumerate(islice(batches(self.train_examples, train), after, n), after + 1):
            rows = self.rows(gpt, batch, share)
            if self.device.type == "cuda":  # a copy from other memory would hold up the host
                rows = [(idx.pin_memory(), packed.pin_memory()) for idx, packed in rows]
            evaluates = number % interval == 0 or number == n
            yield Step(number, learning_rate(number, n, warmup, train.lr), batch, evaluates), rows

    def rows(self, gpt: GPT, examples: Sequence[Example], share: bool = True) -> list[tuple[Tensor, Packed]]:
        """The share of this process of the rows that `examples` are packed into."""
        virtual, of_process = (gpt.n_virtual_tokens, gpt.n_virtual_keys), (self.rank, self.world)
        of_network = gpt.config.short_context, gpt.config.windows
        return pack(examples, self.row_tokens, *virtual, share, *of_process, *of_network)

    def resume(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Loads weights, moments and random numbers of the run that out_dir holds, if there is one."""
        if self.world > 1:  # up to here all have drawn the same numbers; dropout is to differ
            torch.manual_seed(self.options.train.seed + self.rank)
        if self.progress.step:
            self.state.load(network, optimizer)
            print(f"resumed after step {self.progress.step}: {self.state.path}")

    def save_state(self, network: nn.Module, optimizer: torch.optim.Optimizer, watch: Watch) -> None:
        """Where the disk is full, the run continues with the state before; a run that is to stop does not."""
        try:
            self.state.save(network, optimizer, self.progress)
        except OSError as e:
            if watch.signal:
                raise
            watch.bar.write(f"{e}; the run continues")
        watch.saved_at = time.monotonic()

    @property
    def next_command(self) -> str:
        """What to type after the run."""
        options = self.options
        words = ["--method_dir", str(options.out_dir)]
        words += ["--data", "test.csv"] if self.task else ["--prompt", options.train.sample or Train.sample]
        if options.checkpoint_dir.absolute() != demo.DEMO_CHECKPOINT:
            words = ["--checkpoint_dir", str(options.checkpoint_dir), *words]
        return f"python {'scripts/evaluate.py' if self.task else 'generate/base.py'} {shlex.join(words)}"


def start(options: RunOptions) -> Run:
    """Checks the folders, fetches the demo if it is wanted, chooses the device, reads and tokenizes the data.

    Raises ValueError or FileNotFoundError for what a user can mend.
    """
    validate_train(options.train)
    if any(options.out_dir.glob("*.safetensors")) and not options.overwrite:
        if not state_file(options.out_dir).is_file():
            refuse_used(options.out_dir)
    demo.fetch_if_demo(options.checkpoint_dir)
    base = Folder(options.checkpoint_dir)  # says what is wrong with the folder before anything else is done
    if options.init_from is not None:
        take_options(options, base)
    is_demo = Path(options.data).absolute() == demo.DEMO_DATA
    if is_demo:
        demo.fetch_demo_data()
    on_gpu = not options.devices.startswith("cpu") and torch.cuda.is_available()
    if not on_gpu:
        memory.keep_freed_memory()
    fabric = launch(options.devices, options.strategy)
    fabric.seed_everything(options.train.seed, verbose=False)
    stored, progress = ({}, Progress()) if options.overwrite else read_state(options.out_dir)
    tokenizer = Tokenizer(options.checkpoint_dir)
    if progress.began:
        tokenizer.now = datetime.fromisoformat(progress.began)
    tokenizer.now = fabric.broadcast(tokenizer.now)
    tokens = add_tokens(tokenizer, options.tokens)
    validate_options(options.examples, tokenizer)
    limit = options.train.max_examples
    if limit is None and is_demo and fabric.device.type == "cpu":
        limit = 480
        print("the demo on a CPU: training on 480 of its rows (--train.max_examples changes that)")
    with ThreadPoolExecutor(1) as meanwhile:
        if compiles(base, fabric.device):
            meanwhile.submit(import_module, "torch._inductor.compile_fx")  # seconds that tokenizing leaves to Python
        more = dict(val_data=options.val_data, head=options.head, seed=options.train.seed, limit=limit)
        data = read_dataset(options.data, tokenizer, options.examples, **more)
    options = replace(options, examples=replace(options.examples, style=data.style))  # as generation has to ask
    caption = [("the first example, with ", False), ("what is learned", True), (" of it:\n", False)]
    print(marked(caption + parts(data.train[0], tokenizer, data.task), limit=300))
    state = State(options.out_dir, identity(options, base.identity, data.train + data.val), fabric.global_rank)
    if stored:
        state.refuse_other(stored)
    end_if_done(options, progress)
    return Run(
        options=options,
        fabric=fabric,
        dtype=training_dtype(options.dtype, fabric.device),
        base=base,
        tokenizer=tokenizer,
        train_examples=data.train,
        val_examples=data.val,
        row_tokens=options.train.row_tokens or (16384 if on_gpu else 4096),
        task=data.task,
        state=state,
        progress=replace(progress, began=tokenizer.now.isoformat()),
        tokens=tokens,
    )


def take_options(options: RunOptions, base: Folder) -> None:
    """Those of the method in `init_from` that make its network. Raises ValueError for another method or base."""
    header, _ = read_method(options.init_from, base)
    own = getattr(options, header["method"], None)
    is_other = header["base"] != base.identity
    if is_other or (own is None and METHODS[header["method"]]):
        what = f"{header['method']}{' on another base' if is_other else ', which another script trains'}"
        raise ValueError(f"--init_from {options.init_from}: it holds {what}")
    if own:
        made = {name: value for name, value in header["options"].items() if name not in ("dropout", "lr_ratio")}
        setattr(options, header["method"], replace(own, **made))


def end_if_done(options: RunOptions, progress: Progress) -> None:
    """Ends the program where the run that out_dir holds has nothing left to do."""
    limit = options.train.max_time
    if progress.is_finished:
        print(f"{options.out_dir} holds this very run, which ended after step {progress.step}: there is nothing to do")
        sys.exit(0)
    if limit is not None and progress.best and progress.seconds >= 60 * limit:
        print(f"this run has had its train.max_time of {limit} minutes; a higher one resumes it: {options.out_dir}")
        sys.exit(0)


def validate_train(train: Train) -> None:
    """Raises ValueError for a number that makes no sense."""
    positive = ("batch_size", "row_tokens", "epochs", "max_steps", "max_examples", "eval_interval")
    for name, value in vars(train).items():
        least = 1 if name in positive else 0
        if isinstance(value, int | float) and not least <= value < math.inf:  # not: NaN
            limit = "finite" if value == math.inf else f"at least {least}"
            raise ValueError(f"train.{name} is {value}; it must be {limit}")


def compiles(base: Folder, device: torch.device) -> bool:
    """Whether the blocks go through torch.compile: on a GPU, where it pays from a billion parameters on."""
    return device.type == "cuda" and n_parameters(base.config) > 1e9


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where it is multiplied fast, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        is_fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        is_fast = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if is_fast else torch.float32


def build(run: Run, method: str, method_options: Any = None) -> GPT:
    """The network of `options.checkpoint_dir` with a method in it, all else frozen."""
    gpt = empty_network(run.base)
    install_method(gpt, method, method_options, run.task, run.tokens)
    examples = run.train_examples + run.val_examples
    with reading(run.base.path):
        gpt.config.check_tokens(max(int(e.ids.max()) for e in examples))
    gpt.check_length(*(len(e.ids) for e in examples))
    if run.sharded and run.options.quantize == "none":  # it stays in the file until each process takes its slices
        load_base(gpt, run.base, None)
        gpt.dtype = run.dtype
    else:
        load_base(gpt, run.base, run.dtype, run.device, run.options.quantize)
    if run.tokens:
        init_from_base(gpt, Tokenizer(run.base.path))
    return gpt


def prepare(
    run: Run, gpt: GPT, share: bool, lr_scale: Callable[[str], float] | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Compiles the network where that pays, spreads it over the devices, makes the optimizer, and finds rows that fit
    into the GPU's memory.

    Returns the network as Fabric wraps it, to be called where gradients are wanted, and the optimizer.
    """
    if run.options.init_from is not None:
        tensors = read_method(run.options.init_from, run.base)[1]
        if odd := tensors.keys() ^ {name for name, p in gpt.named_parameters() if p.requires_grad}:
            raise ValueError(f"--init_from {run.options.init_from}: {min(odd)} is not trained in both runs")
        with reading(run.options.init_from):
            gpt.load_state_dict(tensors, strict=False)
    n_trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    added = sum(p.numel() for name, p in gpt.named_parameters() if p.requires_grad and not is_base(name))
    run.counted = n_trained, n_parameters(replace(gpt.config, vocab_size=gpt.wte.num_embeddings)) + added
    print(f"{n_trained:,} of {run.counted[1]:,} parameters ({100 * n_trained / run.counted[1]:.2f} %) are trained")
    device = f"{run.world} x {run.device.type}" if run.world > 1 else run.device.type
    batch_size = run.options.train.batch_size
    print(f"{len(run.train_examples)} examples, {run.n_steps} steps of {batch_size}, {device}, {run.dtype}")
    if compiles(run.base, run.device):
        gpt.compile()
    if run.world > 1 and not run.sharded:  # every process has read the frozen ones from the same file
        frozen = [name for name, p in gpt.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(gpt, frozen)
    network = run.fabric.setup_module(gpt)
    optimizer = run.fabric.setup_optimizers(make_optimizer(gpt, run.options.train, lr_scale))
    if run.device.type == "cuda":
        first = list(islice(batches(run.train_examples, run.options.train), 8))
        with torch.random.fork_rng([run.device]):
            memory.plan(run, gpt, first, share)
    return network, optimizer


def make_optimizer(gpt: GPT, train: Train, lr_scale: Callable[[str], float] | None = None) -> torch.optim.Optimizer:
    """AdamW over what requires gradients; only matrices decay."""
    groups = defaultdict(list)
    for name, p in gpt.named_parameters():
        if p.requires_grad:
            decay = train.weight_decay if p.ndim > 1 else 0.0
            scale = lr_scale(name) if lr_scale else 1.0
            groups[decay, scale, isinstance(p, DTensor)].append(p)
    settings = (dict(params=group, weight_decay=d, lr=train.lr * s, lr_scale=s) for (d, s, _), group in groups.items())
    return torch.optim.AdamW(list(settings), betas=(0.9, 0.95), fused=True)


def batches(examples: Sequence[Example], train: Train) -> Iterator[list[Example]]:
    """Batches of `batch_size` examples for ever: each epoch a new order, each example once in it. Those of one
    conversation count as one, and stay together."""
    rng = np.random.default_rng(train.seed)
    starts = [i for i, e in enumerate(examples) if not e.follows]
    ends = [*starts[1:], len(examples)]
    while True:
        order = rng.permutation(len(starts))
        for first in range(0, len(order), train.batch_size):
            yield [e for i in order[first : first + train.batch_size] for e in examples[starts[i] : ends[i]]]


def learning_rate(step: int, n_steps: int, warmup: int, lr: float) -> float:
    """At step 1 to n_steps: linear up to lr in the first `warmup` steps, then half a cosine down towards 0."""
    if step <= warmup:
        return lr * step / warmup
    return lr * (1 + math.cos(math.pi * (step - 1 - warmup) / (n_steps - warmup))) / 2
