"""Which words is a trained soft prompt, or a prefix, nearest to?

    python scripts/inspect_prompt.py --method_dir out/prompt --draw out/prompt/nearest.png

Prints, for each virtual token, the tokens of the vocabulary with the largest cosine similarity: to their embeddings for
a soft prompt; for a prefix to the values that the first layer would make of them, which is the one place where a prefix
and words can be compared (keys carry positions, and deeper layers see more than one word).
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor, arange
from torch.nn.functional import normalize

from lit_model import load
from lit_model.cli import cli
from lit_model.load import load_tokenizer
from lit_model.model import GPT
from lit_model.weights.demo import DEMO_CHECKPOINT


@dataclass
class Options:
    method_dir: Path
    """out_dir of a run of finetune/prompt.py or finetune/prefix.py"""
    checkpoint_dir: Path = DEMO_CHECKPOINT
    """folder of the base network that it was trained on"""
    k: int = 5
    """number of tokens to show for each virtual one"""
    draw: Path | None = None
    """PNG file for a picture of them"""


def main(options: Options) -> None:
    folders = options.checkpoint_dir, options.method_dir
    gpt, tokenizer = load(*folders), load_tokenizer(*folders)
    virtual, vocabulary = vectors(gpt, options.method_dir)
    similarity = normalize(virtual, dim=-1) @ normalize(vocabulary, dim=-1).T  # (P, V)
    best = similarity.topk(min(options.k, len(vocabulary)))
    words = [[repr(tokenizer.decode([i]))[1:-1] for i in row] for row in best.indices.tolist()]
    for i, (row, values) in enumerate(zip(words, best.values.tolist())):
        near = "  ".join(f"{word!r} {value:.2f}" for word, value in zip(row, values))
        print(f"{i:3}  length {virtual[i].norm():.2f}  {near}")
    print(f"     length {vocabulary.norm(dim=-1).mean():.2f}  on average, of the vocabulary")
    if options.draw:
        draw(options.draw, words, best.values)


def vectors(gpt: GPT, method_dir: Path) -> tuple[Tensor, Tensor]:
    """Virtual tokens (P, n) and vocabulary (V, n), in one space."""
    vocabulary = gpt.wte(arange(gpt.config.vocab_size))
    if "prompt" in gpt.virtual_tokens:
        return gpt.virtual_tokens["prompt"](), vocabulary
    if "prefix" in gpt.virtual_keys:
        first = gpt.blocks[0]
        return gpt.virtual_keys["prefix"]()[0, 1].flatten(1), first.attn.v_proj(first.norm_1(vocabulary))
    raise ValueError(f"{method_dir} holds neither a soft prompt nor a prefix")


def draw(path: Path, words: list[list[str]], values: Tensor) -> None:
    figure = Figure(figsize=(1.5 * len(words[0]) + 2, 0.35 * len(words) + 1.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    for y, row in enumerate(words):
        for x, word in enumerate(row):
            color = "white" if values[y, x] < 0.6 else "black"
            axes.text(x, y, word.replace("$", r"\$"), ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="nearest tokens", ylabel="virtual token", xticks=range(len(words[0])), yticks=range(len(words)))
    figure.colorbar(image, label="cosine similarity")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli(main, Options, __doc__)
