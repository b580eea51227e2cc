"""What is trained? Prints examples of a file as text, with what is learned marked: green on a terminal, else [[so]].

    python scripts/show_data.py --data data/alpaca_en_demo.json --n 3
    python scripts/show_data.py --checkpoint_dir CHECKPOINT --data chats.jsonl --format jsonl

Rows stand in the order of the file. The lines behind the examples say how many tokens there are, how many rows are left
out or cut, and why.
"""

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lit_model.cli import cli
from lit_model.data.dataset import style_of
from lit_model.data.examples import ExampleOptions, marked, parts, tokenize, validate_options
from lit_model.data.rows import files_of, read_rows
from lit_model.load import load_tokenizer
from lit_model.weights import demo


@dataclass
class Options:
    data: str = str(demo.DEMO_DATA)
    """file of rows, or owner/name on the Hub, or several files: a.json,b.json; default: the demo's 999 Alpaca rows"""
    checkpoint_dir: Path = demo.DEMO_CHECKPOINT
    """Hugging Face folder whose tokenizer and chat template are taken; default: the demo's, fetched once"""
    method_dir: Path | None = None
    """out_dir of a finetuning run, for the tokens that it adds"""
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    head: Literal["labels", "linear"] = "labels"
    """for rows of text and label, as in the run"""
    n: int = 3
    """number of examples to print, the first"""
    format: Literal["text", "jsonl"] = "text"
    """jsonl: an object for each example, {"ids": [...], "learned": [true, ...], "text": "..."}; the summary goes to
    stderr"""


def main(options: Options) -> None:
    as_text, said = options.format == "text", io.StringIO()
    summary = sys.stdout if as_text else sys.stderr
    with redirect_stdout(summary):
        demo.fetch_if_demo(options.checkpoint_dir)
        if Path(options.data).absolute() == demo.DEMO_DATA:
            demo.fetch_demo_data()
    tokenizer = load_tokenizer(options.checkpoint_dir, options.method_dir)
    validate_options(options.examples, tokenizer)
    with redirect_stdout(said):
        strict = options.examples.strict
        rows = [row for path, _ in files_of(options.data) for row in read_rows(path, strict=strict)]
        style, task = style_of(rows, tokenizer, options.examples, options.head, options.data)
        examples = tokenize(rows, tokenizer, replace(options.examples, style=style), task=task)
    for i, e in enumerate(examples[: options.n], 1):
        pieces = parts(e, tokenizer, task)
        if as_text:
            print(f"--- example {i}: {len(e.ids)} tokens, {e.n_targets} learned\n{marked(pieces)}\n")
        else:
            example = dict(ids=e.ids.tolist(), learned=e.is_learned.tolist(), text="".join(text for text, _ in pieces))
            print(json.dumps(example, ensure_ascii=False))
    lengths, n_targets = [len(e.ids) for e in examples], sum(e.n_targets for e in examples)
    tokens = f"{sum(lengths):,} tokens, {n_targets:,} of them learned; the longest has {max(lengths, default=0)}"
    print(f"{len(rows)} rows read, {len(examples)} examples in the style {style!r}: {tokens}", file=summary)
    print(said.getvalue(), end="", file=summary)  # what is left out, cut or not read


if __name__ == "__main__":
    cli(main, Options, __doc__)
