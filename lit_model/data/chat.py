"""Conversations: the text that a checkpoint's chat template makes of messages, and which parts the assistant says.

A template is a program that comes with a checkpoint, so it runs in jinja2's immutable sandbox: it reaches no file, no
module and no attribute of Python's own, and changes nothing. Powers, large products and ranges are refused, and more
than MAX_STEPS turns of loops and calls of macros. Memory is not limited: a template may double a text until it is full.
"""

import json
import re
import reprlib
from collections.abc import Sequence
from functools import cache
from os.path import commonprefix
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_model.data.rows import Notes, Row, place
from lit_model.data.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_STEPS = 1_000_000  # of the loops and macros of one text
MAX_PRODUCT = 10**7  # characters, items, or the number itself
Message = dict[str, Any]  # role and content; weight 0: not learned


def chat_text(
    tokenizer: Tokenizer | None,
    style: str,
    messages: Sequence[Message],
    asks: bool,
    tools: Sequence[dict] | None = None,
) -> str:
    """The conversation as text, as transformers renders it.

    Args:
        style: chat, for the template of the checkpoint, or chatml.
        asks: it ends where the assistant is to answer.
        tools: JSON schemas of functions that the assistant may call.
    Raises:
        ValueError: the checkpoint has no template, or the template fails or refuses these messages.
    """
    template = CHATML if style == "chatml" else tokenizer.chat_template
    if template is None:
        raise ValueError("this checkpoint has no chat template: take --examples.style chatml")
    if style == "chatml" and (tools or any("tool_calls" in m for m in messages)):
        raise ValueError(
            "the style chatml has no tools: take --examples.style chat and a checkpoint whose template has"
        )
    values = dict(messages=messages, tools=tools, add_generation_prompt=asks)
    if style == "chat":
        values |= dict(bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token)
        values |= dict(strftime_now=tokenizer.now.strftime)
    try:
        compiled = _compiled(template)
        compiled.environment.steps = 0
        return compiled.render(values)
    except Exception as e:  # a template is a program: it may do anything wrong
        start = json.dumps(messages)[:80]
        raise ValueError(f"the checkpoint's chat template cannot take {start}: {type(e).__name__}: {e}") from None


def learned_turns(tokenizer: Tokenizer, style: str, row: Row, notes: Notes) -> list[tuple[str, list[tuple[int, int]]]]:
    """The conversation of a row as texts in which every turn that is learned stands as it will be asked: behind what
    the template makes of the messages before it. Most templates add to that what follows: then one text holds several
    turns. One that changes earlier turns, such as Qwen 3's, which drops their thinking, needs a text for each turn.

    Returns:
        For each text where the turns in it begin and end, in characters: with the token that ends a turn, as in
        generation. What the template writes behind the last of them is left out.
    """
    messages, tools = [_as_given(message) for message in row["messages"]], row.get("tools")
    found: list[tuple[str, list[tuple[int, int]]]] = []
    for i, message in enumerate(row["messages"]):
        says = message["content"].strip() or message.get("tool_calls")
        if i == 0 or message["role"] != "assistant" or not says or message.get("weight") == 0:
            continue  # learned is what the assistant says, but not to begin with, and not nothing
        asked = chat_text(tokenizer, style, messages[:i], asks=True, tools=tools)
        text = chat_text(tokenizer, style, messages[: i + 1], asks=False, tools=tools)
        start = len(commonprefix((asked, text)))
        if start < len(asked):
            start = tokenizer.token_start(text, start)
            asks = reprlib.repr(asked[start:])
            notes.add(f"with a turn that the template asks for with {asks}, and writes without it", place(row))
        ends = [text.rfind(token, start) + len(token) for token in tokenizer.turn_ends if token in text[start:]]
        if not ends:
            notes.add("with a turn that no end token ends: answers may go on for ever", place(row))
        text = text[: max(ends, default=len(text))]
        grows = found and text.startswith(found[-1][0])
        turns = found.pop()[1] if grows else []
        found.append((text, [*turns, (start, len(text))]))
    keys = {key for message in row["messages"] for key in message} | row.keys() & {"tools"}
    words = _words(CHATML if style == "chatml" else tokenizer.chat_template)
    notes.add_unread(keys - words - {"weight"}, place(row))
    return found


def _as_given(message: Message) -> Message:
    """What a template is given: with the thinking under both names in use."""
    thinking = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    return {key: value for key, value in message.items() if key != "weight"} | thinking


@cache
def _words(template: str) -> set[str]:
    """The words of a template: what it may read."""
    return {*re.findall(r"\w+", template.replace("thinking", "reasoning_content"))}


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
    environment.globals |= {"raise_exception": _refuse}
    tree = environment.parse(template)
    for node in tree.find_all((nodes.For, nodes.Macro)):
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(step, node.test)
    return environment.from_string(tree)


def _refuse(message: Any) -> NoReturn:
    raise TemplateError(message)
