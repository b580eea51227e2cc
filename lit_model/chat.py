"""Conversations: the text that a checkpoint's own chat template makes of messages, and which parts of it the assistant
says. Templates are programs that come with a checkpoint: they run in jinja2's sandbox."""

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_model.tokenizer import Tokenizer

if sys.platform == "linux":
    import resource

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Message = dict[str, Any]  # role and content; weight 0: not learned
SECONDS, BYTES = 5, 2**29  # that a template may take for one conversation


def chat_text(tokenizer: Tokenizer, style: str, messages: Sequence[Message], asks: bool) -> str:
    """The conversation as text. asks: it ends where the assistant is to answer.

    Args:
        style: chat, for the template of the checkpoint, or chatml.
    Raises:
        ValueError: the checkpoint has no template, or the template fails or refuses these messages.
    """
    template, eos = (CHATML, None) if style == "chatml" else (tokenizer.chat_template, tokenizer.eos_token)
    if template is None:
        raise ValueError("this checkpoint has no chat template in tokenizer_config.json: take --prompt.style chatml")
    if style == "chat" and tokenizer.is_sentencepiece:
        raise ValueError(
            "a tokenizer.model cannot read the tokens of a chat template: put its tokenizer.json beside it"
        )
    bos = tokenizer.bos_token or "" if tokenizer else ""
    try:
        values = dict(messages=messages, add_generation_prompt=asks, bos_token=bos, eos_token=eos)
        with _limited(SECONDS, BYTES):
            text = _compiled(template).render(values)
    except SecurityError as e:
        raise ValueError(f"the checkpoint's chat template does what a template must not: {e}") from None
    except Exception as e:  # a template is a program: it may do anything wrong
        raise ValueError(f"the checkpoint's chat template cannot take {json.dumps(messages)[:80]}: {e}") from None
    return text.removeprefix(bos) if tokenizer and tokenizer.bos else text  # it is added once, where examples are made


def is_learned(messages: Sequence[Message]) -> list[bool]:
    """Of each message, whether it is: what the assistant says, but not to begin with, and not nothing."""
    return [
        i > 0 and m["role"] == "assistant" and bool(m["content"].strip()) and m.get("weight") != 0
        for i, m in enumerate(messages)
    ]


def turns(tokenizer: Tokenizer, style: str, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The conversation up to the assistant's last turn in pieces: (text, whether the assistant says it). A turn ends
    with the token that ends it, as in generation; what the template writes behind that belongs to the next piece.

    Raises ValueError if there is no such turn, or the template writes earlier turns in another way than the last.
    """
    pieces, done = [], ""
    for i, learned in enumerate(is_learned(messages)):
        if not i or messages[i]["role"] != "assistant":
            continue
        before = chat_text(tokenizer, style, messages[:i], asks=True)
        after = chat_text(tokenizer, style, messages[: i + 1], asks=False)
        if not (before.startswith(done) and after.startswith(before)):
            what = "the checkpoint's chat template rewrites earlier turns, or asks otherwise than it writes answers"
            raise ValueError(f"{what}: take --prompt.style chatml, if the tokenizer knows <|im_start|>")
        said = after[len(before) :]
        ends = max((said.rfind(t) + len(t) for t in tokenizer.turn_ends if t in said), default=len(said))
        pieces += [(before[len(done) :], False), (said[:ends], learned)]
        done = before + said[:ends]
    if not pieces:
        raise ValueError("the assistant says nothing in it")
    return pieces


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses powers, which nothing can interrupt."""

    intercepted_binops = frozenset(("**",))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> NoReturn:
        raise SecurityError(f"{left} {operator} {right}")


class _Generation(Extension):
    """transformers' tag around what the assistant says: what stands in it, as it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[Any]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@contextmanager
def _limited(seconds: int, size: int) -> Iterator[None]:
    """Stops what does not end or takes `size` bytes more than there are in use: in the main thread and on Linux, where
    Python can do that."""

    def stop(*_: Any) -> NoReturn:
        raise SecurityError(f"it takes more than {seconds} seconds")

    if threading.current_thread() is not threading.main_thread() or sys.platform != "linux":
        yield
        return
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    allowed = [n for n in (in_use + size, *limits) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), limits[1]))
    signal.alarm(seconds)
    try:
        yield
    except MemoryError:
        raise SecurityError(f"it takes more than {size} bytes") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@cache
def _compiled(template: str) -> Template:
    options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment = _Sandbox(**options)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals |= dict(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(template)


def _refuse(message: Any) -> NoReturn:
    raise TemplateError(message)
