"""What a run starts from: its options, the data as tokens, the device, and the network with a method in it."""

import copy
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from tqdm import tqdm

from finetune import memory
from finetune.devices import Strategy, launch
from finetune.report import n_parameters
from finetune.state import States, identity
from lit_model import classify, hub
from lit_model.checkpoint import freeze, load_base
from lit_model.data import PromptOptions
from lit_model.dataset import read_dataset
from lit_model.examples import check as check_prompt
from lit_model.files import blamed_on
from lit_model.model import GPT, Config
from lit_model.packing import Example, pack
from lit_model.quantize import Kind
from lit_model.tokenizer import Tokenizer


@dataclass
class Train:
    """How it is trained."""

    lr: float = 1e-3
    """highest learning rate of AdamW"""
    min_lr: float = 0.0
    """learning rate that a cosine falls to in the course of the run"""
    warmup_steps: int | None = None
    """steps in which the learning rate rises from 0; null: a tenth of all steps"""
    weight_decay: float = 0.02
    """for matrices only: gates, norms, biases and other vectors never decay"""
    grad_clip: float = 1.0
    """the norm of the whole gradient is cut to this; 0: never"""
    batch_size: int = 16
    """examples per optimizer step, however many rows and devices they are spread over"""
    row_tokens: int | None = None
    """about the most tokens of a packed row, which is one pass through the network; an example is never cut for it;
    null: 4096 on a CPU; on a GPU 16384, and fewer if its memory demands it"""
    epochs: int = 1
    """passes over the training rows, each in a new order"""
    max_steps: int | None = None
    """end after so many optimizer steps"""
    max_time: float | None = None
    """end after so many minutes of training"""
    max_examples: int | None = None
    """train on so many rows only; null: all, and 480 for the demo data on a CPU"""
    eval_interval: int | None = None
    """steps between two evaluations; null: two in the run, halfway and at the end"""
    save_every_minutes: float = 15.0
    """keep the state of the run so often, and at every evaluation: an interrupted run goes on from there; 0: at every
    step"""
    nonfinite: Literal["stop", "skip"] = "stop"
    """when a gradient is infinite or no number: stop, or leave that step out and count it"""
    full_disk: Literal["go_on", "stop"] = "go_on"
    """when a state cannot be written: go on with the one before, or stop"""
    patience: int = 0
    """end after so many evaluations in a row without a better validation loss; 0: never"""
    seed: int = 0
    """of the validation split, the order of the rows, initial values and dropout"""
    sample: str = "Give three tips for staying healthy."
    """an instruction that is answered at the start and at every evaluation; empty: none"""


@dataclass
class Options:
    """Options that all methods share."""

    checkpoint_dir: Path = hub.DEMO_CHECKPOINT
    """folder of the base network; by default the demo's SmolLM2-135M-Instruct, fetched once"""
    data: str = str(hub.DEMO_DATA)
    """.json, .jsonl or .csv file of rows with instruction, input and output, or of another kind (docs/finetune.md), or
    a .txt file; several with weights: a.json,b.json:0.5; by default 999 Alpaca rows, fetched once"""
    val_data: Path | None = None
    """file of the validation rows; null: a share of the others, prompt.val_fraction"""
    out_dir: Path = Path("out/finetune")
    """folder for the trained tensors, the loss curve and the settings of the run"""
    prompt: PromptOptions = field(default_factory=PromptOptions)
    train: Train = field(default_factory=Train)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the base weights and all activations; auto: bfloat16 on GPUs and CPUs that multiply it fast, else float32"""
    head: Literal["labels", "linear"] = "labels"
    """for rows of text and label: the label is words after the text, or what a trained layer of its own says"""
    quantize: Kind = "none"
    """keep the frozen base weights in fewer bits: nf4 (QLoRA) or int8 for little memory, fp8 for speed on an H100"""
    devices: str = "auto"
    """auto: the GPU if there is one, or what torchrun or SLURM has started; a number of GPUs of this machine; cpu, or
    cpu:2 for so many processes"""
    strategy: Strategy = "auto"
    """of several devices: ddp, each holds the whole network; fsdp, each a slice of it; fsdp_offload, a slice that waits
    in the host's memory; auto: ddp"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for each block; auto: on a GPU for networks of a billion parameters and more, where it pays"""
    memory_gb: float | None = None
    """GiB of a GPU's memory to use at most: shorter rows, then recomputing blocks, then the host's memory make it do;
    null: all that is free"""
    deterministic: bool = False
    """the same numbers, bit for bit, whenever a run is repeated on the same machine with the same memory free"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run that out_dir holds, if it was interrupted"""
    overwrite: bool = False
    """replace the run that out_dir holds"""
    dry_run: bool = False
    """say what the run would need of memory, time and disk, measured in three steps, and write nothing"""


@dataclass
class Trunk:
    """What the frozen blocks below `first_block` give for each token of the training examples, (tokens, C)."""

    x: Tensor
    first_block: int


@dataclass
class Run:
    """What `start` has found out and `fit` works with."""

    options: Options
    fabric: Fabric
    dtype: torch.dtype
    tokenizer: Tokenizer
    train_examples: list[Example]
    val_examples: list[Example]
    row_tokens: int
    task: classify.Task | None = None  # of rows with text and label
    trunk: Trunk | None = None  # what `cache_trunk` has made
    states: States | None = None
    state: Path | None = None  # that the run goes on from

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


def start(options: Options) -> Run:
    """Checks the folders, fetches the demo if it is wanted, chooses the device, reads and tokenizes the data.

    Raises ValueError or FileNotFoundError for what a user can mend.
    """
    check(options.train)
    if (options.out_dir / "lit_config.json").is_file():
        raise ValueError(f"{options.out_dir} is a checkpoint folder; name another --out_dir")
    out_dir = options.out_dir.absolute()
    there = next(path for path in (out_dir / "state", out_dir, *out_dir.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{there} is no folder that can be written to; name another --out_dir")
    states = options.resume == "auto" and States.any_in(options.out_dir)  # they compare the runs
    if any(options.out_dir.glob("*.safetensors")) and not (options.overwrite or states):
        raise ValueError(
            f"{options.out_dir} holds a run already; name another --out_dir, or replace it with --overwrite"
        )
    hub.fetch_if_demo(options.checkpoint_dir)
    config = Config.load(options.checkpoint_dir)  # says what is wrong with the folder before anything else is done
    if demo := Path(options.data).absolute() == hub.DEMO_DATA:
        hub.fetch_demo_data()
    on_gpu = not options.devices.startswith("cpu") and torch.cuda.is_available()
    if not on_gpu:
        memory.keep_freed_memory()
    if options.memory_gb is not None:
        if not on_gpu:
            raise ValueError("memory_gb limits the memory of a GPU, and none is used here")
        if not options.memory_gb > 0:
            raise ValueError(f"memory_gb is {options.memory_gb}; it must be above 0")
    if options.quantize == "fp8" and not on_gpu:
        print("fp8 products are slow on a CPU: this tries what a GPU would do; --quantize int8 is faster here")
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    fabric = launch(options.devices, options.strategy)
    fabric.seed_everything(options.train.seed, verbose=False)
    tokenizer = Tokenizer(options.checkpoint_dir)
    check_prompt(options.prompt, tokenizer)
    if options.train.patience and not (options.prompt.val_fraction or options.val_data):
        raise ValueError("train.patience needs validation rows, but prompt.val_fraction is 0")
    limit = options.train.max_examples
    if limit is None and demo and fabric.device.type == "cpu":
        limit = 480
        print(f"the demo on a CPU: training on {limit} of its rows (--train.max_examples changes that)")
    with ThreadPoolExecutor(1) as meanwhile:
        if compiles(options, config, fabric.device):
            meanwhile.submit(import_module, "torch._inductor.compile_fx")  # seconds that tokenizing leaves to Python
        data = read_dataset(
            options.data,
            tokenizer,
            options.prompt,
            val_data=options.val_data,
            head=options.head,
            seed=options.train.seed,
            limit=limit,
            cache_dir=hub.DEMO_DATA.parent / "cache",
        )
        with blamed_on(options.checkpoint_dir):
            config.check_tokens(max(int(e.ids.max()) for e in data.train + data.val))
        options = replace(options, prompt=replace(options.prompt, style=data.style))  # as generation has to ask
        states = States(options.out_dir, identity(options, data.train + data.val), fabric.global_rank)
        state = None
        if options.resume == "auto" and not options.overwrite:
            if (step := states.finished()) is not None:
                print(f"{options.out_dir} holds this very run, which ended after step {step}: there is nothing to do")
                sys.exit(0)
            try:
                found = (states.newest() if fabric.is_global_zero else None), ""
            except ValueError as e:
                found = None, str(e)
            state, mistake = fabric.broadcast(found)
            if mistake:
                raise ValueError(mistake)
        return Run(
            options,
            fabric,
            training_dtype(options.dtype, fabric.device),
            tokenizer,
            train_examples=data.train,
            val_examples=data.val,
            row_tokens=options.train.row_tokens or (16384 if on_gpu else 4096),
            task=data.task,
            states=states,
            state=state,
        )


def check(train: Train) -> None:
    """Raises ValueError for a number that makes no sense."""
    positive = ("batch_size", "row_tokens", "epochs", "max_steps", "max_examples", "eval_interval")
    for name, value in vars(train).items():
        least = 1 if name in positive else 0
        if isinstance(value, int | float) and not least <= value < math.inf:  # not: NaN
            limit = "finite" if value == math.inf else f"at least {least}"
            raise ValueError(f"train.{name} is {value}; it must be {limit}")


def compiles(options: Options, config: Config, device: torch.device) -> bool:
    """Whether the blocks go through torch.compile. Raises ValueError where that is wanted and cannot be."""
    compiler = os.getenv("CXX", "g++").split()  # it may have arguments, or be empty
    if options.compile == "on" and device.type == "cpu" and not (compiler and shutil.which(compiler[0])):
        raise ValueError("--compile on needs a C++ compiler on a CPU: install g++, or leave it away")
    auto = options.compile == "auto" and device.type == "cuda" and n_parameters(config) > 1e9
    return options.compile == "on" or auto


def training_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where it is multiplied fast, else float32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def build(run: Run, method: ModuleType, **method_options: Any) -> GPT:
    """The network of `options.checkpoint_dir` with a method of lit_model/ in it, all else frozen. The options of the
    method, if it has any, under the name that its Config gives them."""
    checkpoint_dir = run.options.checkpoint_dir
    with torch.device("meta"):
        gpt = method.GPT(method.Config.load(checkpoint_dir, **method_options))
        if run.task and run.task.head == "linear":
            classify.install(gpt, len(run.task.classes))

    def trainable(name: str, config: Config) -> bool:  # a head of its own takes the place of lm_head
        return name.startswith("heads.") or (
            method.trainable(name, config) and not (gpt.heads and name.startswith("lm_head."))
        )

    keep = {name for name in gpt.state_dict() if trainable(name, gpt.config)}
    if run.sharded and run.options.quantize == "none":  # it stays in the file until each process takes its slices
        load_base(gpt, checkpoint_dir, None, "cpu", keep=keep)
        gpt.dtype = run.dtype
        freeze(gpt, trainable, widen=False)
    else:
        load_base(gpt, checkpoint_dir, run.dtype, run.device, run.options.quantize, keep)
        freeze(gpt, trainable)
    return gpt


@torch.no_grad()
def cache_trunk(run: Run, gpt: GPT) -> Run:
    """Computes what lies below the first block that is trained once for all epochs, and keeps it on the host.

    Raises ValueError if something below the blocks is trained.
    """
    if run.world > 1 or run.sharded:
        raise ValueError("--cache_features works in one process: leave --devices and --strategy away")
    trained = [any(p.requires_grad for p in block.parameters()) for block in gpt.blocks]
    first_block = [*trained, True].index(True)
    below = [m for m in (gpt.wte, gpt.wpe, gpt.virtual_tokens, gpt.virtual_keys) if m is not None]
    if any(p.requires_grad for m in below for p in m.parameters()):
        raise ValueError("--cache_features keeps what comes out of frozen layers, and here the first ones are trained")
    ends = np.cumsum([len(e.ids) for e in run.train_examples])
    examples = [replace(e, at=int(end) - len(e.ids)) for e, end in zip(run.train_examples, ends)]
    below = copy.copy(gpt)  # the same network without what lies above
    identity = dict(norm_f=nn.Identity(), heads=nn.ModuleDict({"features": nn.Identity()}))
    below._modules = gpt._modules | dict(blocks=gpt.blocks[:first_block], **identity)
    x = torch.empty(int(ends[-1]), gpt.config.n_embd, dtype=gpt.dtype)
    print(f"features of {len(examples)} examples, below block {first_block}: {x.nbytes / 2**30:.2f} GiB of host memory")
    for idx, packed in tqdm(pack(examples, run.row_tokens, share=False), desc="features", unit="row", leave=False):
        whole = replace(packed, wanted=None, targets=None, last=None)
        x[packed.source] = below(idx.to(run.device), whole.to(run.device)).cpu()
    return replace(run, train_examples=examples, trunk=Trunk(x, first_block))
