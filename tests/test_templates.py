"""Chats become the ids that transformers makes of them: every kind of tokenizer with every chat template that TRL
carries. Run with -s to see how many are compared, and what Qwen 3's template is asked and trained."""

import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import say
from test_convert import sentencepiece
from test_show_data import CHATS as THOUGHTFUL
from test_show_data import write
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer

from finetune import lora
from lit_model.data.chat import chat_text
from lit_model.data.examples import ExampleOptions, prompt_ids, tokenize
from lit_model.data.rows import read_rows
from lit_model.data.tokenizer import Tokenizer

TRL = "trl==1.16.0"  # Apache-2.0; its templates are read, and nothing of it is installed
KINDS = ("bytes", "bytes with bos", "rstrip", "tokenizer.model", "added tokens", "prepend", "always", "first", "never")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "one"}},
            "required": ["a"],
        },
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
CHATS = {
    "system": [{"role": "system", "content": "Be brief."}, user("apple river?"), assistant("seven  green")],
    "turns": [user("apple"), assistant("river"), user("stone"), assistant(" green\nquiet"), user("seven"),
              assistant("é")],
    "thinking": [user("apple"), assistant("river", reasoning_content="hm"), user("stone"),
                 assistant("green", reasoning_content="so")],
    "tools": [user("apple"), assistant("", tool_calls=[CALL]),
              {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "2"}, assistant("seven")],
}  # fmt: skip


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("trl")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), TRL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".jinja")]
        return {name.rpartition("/")[2]: wheel.read(name).decode() for name in names}


def special_tokens(templates: dict[str, str]) -> list[str]:
    pattern = r"<\|\w+\|?>|<\w+\|>|</?\w+_of_turn>|</?think>|</?tool_\w+>|<｜[^｜\"']+｜>"
    return sorted({token for template in templates.values() for token in re.findall(pattern, template)})


@pytest.fixture(scope="module", params=KINDS)
def folder(request, templates, tiny, tmp_path_factory):
    """A checkpoint folder, but for its network, whose tokenizer knows all tokens of all templates."""
    kind, folder = request.param, tmp_path_factory.mktemp("kind")
    more = special_tokens(templates)
    stated = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if kind in ("bytes", "bytes with bos", "rstrip"):
        tokenizer = HFTokenizer.from_file(str(tiny / "base/tokenizer.json"))
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.add_special_tokens([AddedToken(token, rstrip=kind == "rstrip") for token in more])
        begins = "<s> $A" if kind == "bytes with bos" else "$A"
        tokenizer.post_processor = processors.TemplateProcessing(
            begins, special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        n = sentencepiece(folder).get_piece_size()
        (folder / "sp.model").rename(folder / "tokenizer.model")
        stated |= {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "always", "add_prefix_space": kind != "never"}
        if kind != "tokenizer.model":
            (folder / "added_tokens.json").write_text(json.dumps({token: n + i for i, token in enumerate(more)}))
        if kind == "prepend":  # as LLaMA 2's tokenizer.json
            (folder / "tokenizer_config.json").write_text(json.dumps(stated))
            tokenizer = Tokenizer(folder).hf
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
            tokenizer.save(str(folder / "tokenizer.json"))
            stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ends = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(
        [
            "<|im_end|>",
            "<|eot_id|>",
            "<end_of_turn>",
            "<turn|>",
            "<|return|>",
            "<｜end▁of▁sentence｜>",
            "<|END_OF_TURN_TOKEN|>",
        ]
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [i for i in ends if i]}))
    return folder


def test_ids_equal_transformers(folder, templates):
    """Up to the end of each learned turn all ids are those of transformers, and so are those that generation starts
    from, unless a template asks otherwise than it writes answers."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    n_turns = n_asked = n_refused = 0
    for name, template in templates.items():
        ours.chat_template = template
        for kind, chat in CHATS.items():
            row = {"messages": chat} | ({"tools": [TOOL]} if kind == "tools" else {})
            examples = tokenize([row], ours, OPTIONS)

            def rendered(n: int, asks: bool, ids: bool, chat=chat, row=row, template=template) -> list[int] | str:
                more = dict(tools=row.get("tools"), add_generation_prompt=asks, return_dict=False, tokenize=ids)
                return theirs.apply_chat_template(chat[:n], chat_template=template, **more)

            turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
            try:
                expected = [(rendered(i, True, True), rendered(i + 1, False, True)) for i in turns]
            except Exception:  # a template that refuses this chat
                n_refused += 1
                assert examples == [], (name, kind)
                continue
            found = []
            for e in examples:
                edges = np.flatnonzero(np.diff([0, *e.is_learned, 0])).tolist()
                found += [(e.ids.tolist(), start, end) for start, end in zip(edges[::2], edges[1::2])]
            assert len(found) == len(turns), (name, kind)
            for (ids, start, end), (asked, told), i in zip(found, expected, turns):
                n_turns += 1
                assert ids[:end] == told[:end] and not set(told[end:]) & {*ours.stop_ids}, (name, kind)
                if rendered(i + 1, False, False).startswith(rendered(i, True, False)):
                    n_asked += 1
                    assert ids[:start] == asked, (name, kind)
    print(
        f"{n_turns} turns of {len(templates)} templates as transformers, {n_asked} asked so; {n_refused} chats refused"
    )
    assert len(templates) >= 72 and n_turns > 500 and n_asked > 400


OPTIONS = ExampleOptions(style="chat", max_length=100_000)


def test_a_run_on_qwen_3s_own_template(templates, chat_checkpoint, tmp_path, capsys, monkeypatch):
    """Several turns with thinking: run with -s to see what is asked beside what is trained."""
    tokenizer = chat_checkpoint(templates["qwen3.jinja"])
    write(tmp_path / "chats.jsonl", THOUGHTFUL)
    out = f"--out_dir {tmp_path}/out --train.batch_size 4 --examples.max_length 500 --devices cpu"
    said = say(lora, capsys, monkeypatch, f"--checkpoint_dir {tmp_path}/model --data {tmp_path}/chats.jsonl {out}")
    assert "33 examples, 3 steps of 4" in said and "[[<think>\nhm\n</think>\n\nriver<|im_end|>]]" in said
    examples = tokenize(read_rows(tmp_path / "chats.jsonl"), tokenizer, OPTIONS)
    for e, i in zip(examples, (1, 3, 5)):
        messages = THOUGHTFUL[0]["messages"]
        asked = prompt_ids(tokenizer, "chat", chat_text(tokenizer, "chat", messages[:i], asks=True))
        trained = tokenizer.decode(e.ids[e.first_target :], special=True)
        print(f"asked:   {tokenizer.decode(asked, special=True)!r}\ntrained: {trained!r}")
        assert e.ids[: e.first_target].tolist() == asked
        answer, thinking = messages[i]["content"], messages[i]["reasoning_content"]
        assert trained == f"<think>\n{thinking}\n</think>\n\n{answer}<|im_end|>"
