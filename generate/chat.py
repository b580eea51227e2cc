"""Talk to a network, with what finetuning runs have trained on it or without.

    python generate/chat.py --method_dir out/lora
    python generate/chat.py --method_dir fr=out/fr,de=out/de

/system TEXT gives it a role, /method NAME changes who answers, base the network alone, /reset begins anew, /help lists
these. Ctrl-C stops an answer, Ctrl-D ends.
"""

import sys
import time
from dataclasses import dataclass
from itertools import count

from generate.base import style_of
from lit_model.cli import cli
from lit_model.data.examples import chat_ids
from lit_model.data.tokenizer import Tokenizer
from lit_model.generate import generate_batch, stream_text
from lit_model.load import NetworkOptions, named_dirs
from lit_model.sampling import Sampling


@dataclass
class Options(NetworkOptions):
    method_dir: str = ""
    """out_dir of a finetuning run on that base; of several, with commas between them, perhaps with names: fr=out/fr"""
    system: str = ""
    """what the network is told first"""
    max_new_tokens: int = 500
    """most tokens of an answer"""
    temperature: float = 0.7
    """0: the likeliest token each time; higher: more varied"""
    top_p: float | None = 0.95
    """sample from the smallest set of tokens that has this probability"""
    seed: int | None = None
    """the same seed gives the same answers"""


class Chat:
    """A conversation: `say` answers, the commands change it."""

    def __init__(self, options: Options):
        folders = named_dirs(options.method_dir)
        if "base" in folders:
            raise ValueError("base is the name of the network alone: name the method otherwise, NAME=FOLDER")
        self.options, self.gpt = options, options.load(folders)
        self.tokenizer = Tokenizer(options.checkpoint_dir)
        self.styles = {"base": "chat"} | {name: style_of(path) for name, path in folders.items()}
        self.name = [*self.styles][min(1, len(folders))]
        self.system(options.system)

    def system(self, text: str) -> None:
        self.messages = [dict(role="system", content=text)] if text else []

    def method(self, name: str) -> None:
        if name not in self.styles:
            raise ValueError(f"there is no method {name!r}; there are {', '.join(self.styles)}")
        self.name = name

    def reset(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def say(self, question: str) -> None:
        """Prints the answer as it comes. Raises ValueError if the conversation is longer than the context."""
        o, stop_ids = self.options, self.tokenizer.stop_ids
        messages = [*self.messages, dict(role="user", content=question)]
        ids = chat_ids(self.tokenizer, self.styles[self.name], messages)
        method = None if self.name == "base" else self.name
        way = Sampling(o.temperature, top_p=o.top_p, seed=o.seed)
        made = generate_batch(self.gpt, [ids], o.max_new_tokens, [way], stop_ids, [method])
        counter = count()  # zip takes a number for each token
        tokens = (token for (_, token), _ in zip(made, counter))
        began, answer = time.perf_counter(), ""
        try:
            for piece in stream_text(self.tokenizer, tokens):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        seconds, n = time.perf_counter() - began, next(counter)
        print(f"({self.name}: {n} tokens, {n / seconds:.1f} tokens/s)", file=sys.stderr, flush=True)
        if answer:
            self.messages = [*messages, dict(role="assistant", content=answer)]


def main(options: Options) -> None:
    chat = Chat(options)
    commands = {"/system": chat.system, "/method": chat.method, "/reset": chat.reset}
    try:
        import readline  # noqa: F401  history and editing of lines, where the system has it
    except ImportError:
        pass
    print(f"You talk to {chat.name}; /help lists commands.", flush=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/help":
                print(__doc__.split("\n\n")[-1].strip(), "Methods:", ", ".join(chat.styles))
            elif command in commands:
                commands[command](rest.strip())
            elif command.startswith("/"):
                print(f"there is no command {command}; /help lists them")
            elif line:
                chat.say(line)
        except ValueError as e:
            print(f"error: {e}")


if __name__ == "__main__":
    cli(main, Options, __doc__)
