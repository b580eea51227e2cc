"""Conversations: the text that a checkpoint's chat template makes of messages, and which parts the assistant says.

A template is a program that comes with a checkpoint, so it runs in jinja2's immutable sandbox: it reaches no file, no
module and no attribute of Python's own, and changes nothing. Powers, large products and ranges are refused, and more
than MAX_STEPS turns of loops and calls of macros. Memory is not limited: a template may double a text until it is full.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_model.data.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_STEPS = 1_000_000  # of the loops and macros of one text
MAX_PRODUCT = 10**7  # characters, items, or the number itself
Message = dict[str, Any]  # role and content; weight 0: not learned


def chat_text(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], asks: bool, tools: Sequence[dict] | None = None
) -> str:
    """The conversation as text, without the BOS token that is added where examples are made.

    Args:
        style: chat, for the template of the checkpoint, or chatml.
        asks: it ends where the assistant is to answer.
        tools: JSON schemas of functions that the assistant may call.
    Raises:
        ValueError: the checkpoint has no template, or the template fails or refuses these messages.
    """
    template, eos = (CHATML, None) if style == "chatml" else (tokenizer.chat_template, tokenizer.eos_token)
    if template is None or (style == "chat" and tokenizer.is_sentencepiece):
        needs = "take --examples.style chatml, or put its tokenizer.json beside a tokenizer.model"
        raise ValueError(f"this checkpoint has no chat template that its tokenizer can read: {needs}")
    if style == "chatml" and (tools or any("tool_calls" in m for m in messages)):
        raise ValueError(
            "the style chatml has no tools: take the template of a checkpoint that has, --examples.style chat"
        )
    bos = tokenizer.bos_token or "" if tokenizer else ""
    try:
        compiled = _compiled(template)
        compiled.environment.steps = 0
        more = dict(tools=tools, add_generation_prompt=asks, bos_token=bos, eos_token=eos)
        text = compiled.render(messages=messages, **more)
    except Exception as e:  # a template is a program: it may do anything wrong
        start = json.dumps(messages)[:80]
        raise ValueError(f"the checkpoint's chat template cannot take {start}: {type(e).__name__}: {e}") from None
    return text.removeprefix(bos) if tokenizer and tokenizer.bos else text


def is_learned(messages: Sequence[Message]) -> list[bool]:
    """For each message whether it is: what the assistant says, but not to begin with, and not nothing."""
    return [
        i > 0
        and m["role"] == "assistant"
        and m.get("weight") != 0
        and bool(m["content"].strip() or m.get("tool_calls"))
        for i, m in enumerate(messages)
    ]


def turns(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], tools: Sequence[dict] | None = None
) -> list[tuple[str, bool]]:
    """The conversation up to the assistant's last turn in pieces: (text, whether it is learned). A turn ends with the
    token that ends it, as in generation; what the template writes behind that belongs to the next piece.

    Raises ValueError if the template writes earlier turns in another way than the last.
    """
    pieces, done = [], ""
    for i, learned in enumerate(is_learned(messages)):
        if i == 0 or messages[i]["role"] != "assistant":
            continue
        before = chat_text(tokenizer, style, messages[:i], asks=True, tools=tools)
        after = chat_text(tokenizer, style, messages[: i + 1], asks=False, tools=tools)
        if not (before.startswith(done) and after.startswith(before)):
            what = "the checkpoint's chat template rewrites earlier turns, or asks otherwise than it writes answers"
            raise ValueError(f"{what}: take --examples.style chatml, if the tokenizer knows <|im_start|>")
        answer = after[len(before) :]
        ends = [answer.rfind(token) + len(token) for token in tokenizer.turn_ends if token in answer]
        end = max(ends, default=len(answer))
        pieces += [(before[len(done) :], False), (answer[:end], learned)]
        done = before + answer[:end]
    return pieces


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses what takes too long."""

    intercepted_binops = frozenset(("**", "*"))
    steps = 0

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or _size(left) * _size(right) > MAX_PRODUCT:
            _refuse(f"{str(left)[:20]} {operator} {str(right)[:20]} is refused")
        return super().call_binop(context, operator, left, right)

    def step(self) -> bool:
        self.steps += 1
        if self.steps > MAX_STEPS:
            _refuse(f"it takes more than {MAX_STEPS:,} steps")
        return True


def _size(value: Any) -> float:
    return abs(value) if isinstance(value, int | float) else len(value)


class _Generation(Extension):
    """transformers' tag around what the assistant says: what stands in it, as it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[Any]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(template: str) -> Template:
    """The template, with a call of `step` in each loop and macro."""
    options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment = _Sandbox(**options)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals |= dict(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    tree = environment.parse(template)
    for node in tree.find_all((nodes.For, nodes.Macro)):
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(step, node.test)
    return environment.from_string(tree)


def _refuse(message: Any) -> NoReturn:
    raise TemplateError(message)
