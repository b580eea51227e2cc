"""Finetune every parameter of the network, in float32, while the activations are in bfloat16 where that is fast.

Without arguments it runs the demo. The method is lit_model/methods/full.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.merge import merge


@dataclass
class Options(RunOptions):
    save_hf: bool = True
    """also write the whole network as a Hugging Face folder, out_dir/hf"""
    out_dir: Path = may_differ(Path("out/full"))
    train: Train = field(default_factory=lambda: Train(lr=1e-4))


def main(options: Options) -> Summary:
    if options.quantize != "none":
        raise ValueError("--quantize is a form of frozen weights, and full finetuning freezes none")
    run = start(options)
    gpt = build(run, "full")
    summary = fit(run, gpt, "full")
    if options.save_hf and run.rank == 0 and not options.dry_run:
        merge(options.checkpoint_dir, options.out_dir, options.out_dir / "hf", overwrite=True)
    return summary


if __name__ == "__main__":
    cli(main, Options, __doc__)
