"""Conversations: only what the assistant says is learned, in the words of the checkpoint's own template, which may do
nothing else than write."""

import json
import re
import threading

import pytest
import torch
from conftest import LLAMA, randomize, say
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from transformers import PreTrainedTokenizerFast

from finetune import lora
from generate import base
from lit_model import model
from lit_model.data.chat import CHATML, chat_text, learned_turns
from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions, prompt_ids, render, tokenize
from lit_model.data.rows import Notes, Row, read_rows
from lit_model.data.tokenizer import Tokenizer
from lit_model.packing import Example, pack
from lit_model.weights.folder import save_folder, tokenizer_files

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end_of|>\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end_of|>\n\n{% endif %}"
)
MARKED = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")  # as SmolLM3's is
CHAT = [
    {"role": "system", "content": "makes stone"},
    {"role": "user", "content": "apple river?"},
    {"role": "assistant", "content": "seven green"},
    {"role": "user", "content": "finds under?"},
    {"role": "assistant", "content": "quiet above"},
]


@pytest.fixture
def chatty(tiny, tmp_path):
    """A checkpoint whose tokenizer knows ChatML's tokens; a call sets its template."""

    def make(template: str | None) -> Tokenizer:
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        tokenizer = HFTokenizer.from_file(str(tiny / "base/tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(t) for t in ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end_of|>")])
        tokenizer.save(str(folder / "tokenizer.json"))
        stated = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        return Tokenizer(folder)

    return make


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MARKED, None], ids=["chatml", "llama-3", "marked", "none"])
def test_only_the_assistants_turns_are_learned(chatty, template):
    tokenizer = chatty(template)
    (e,) = tokenize([{"messages": CHAT}], tokenizer, ExampleOptions(max_length=500))
    hf = PreTrainedTokenizerFast(tokenizer_file=None, tokenizer_object=tokenizer.hf, bos_token="<bos>")
    whole = hf.apply_chat_template(CHAT, chat_template=template or CHATML, tokenize=False)
    first = tokenizer.bos if template is None else []  # a template writes it, or there is none
    assert e.ids.tolist() == first + hf.encode(whole.rstrip("\n"), add_special_tokens=False)
    learned = e.ids[e.first_target :][e.learned].tolist()
    assert tokenizer.hf.decode(learned, skip_special_tokens=False) == "seven green<|im_end|>quiet above<|im_end|>"
    assert e.n_targets == len(learned)
    style = "chat" if template else "chatml"
    prompt = prompt_ids(tokenizer, style, chat_text(tokenizer, style, CHAT[:2], asks=True))
    assert e.ids[: e.first_target].tolist() == prompt  # the very ids that generation starts from
    assert set(tokenizer.stop_ids) == {tokenizer.eos_id, tokenizer.encode("<|im_end|>")[0]}


def test_instructions_in_the_style_chat_are_a_turn_of_each(chatty):
    tokenizer = chatty("<bos>" + LLAMA_3.removeprefix("{{ bos_token }}"))  # spelt out: still once
    rows = [dict(instruction="apple?", input="stone", output=output) for output in ("seven", " ")]
    (e,) = tokenize(rows, tokenizer, ExampleOptions(style="chat", max_length=500))
    prompt = prompt_ids(tokenizer, "chat", render("chat", "apple?", "stone", tokenizer))
    assert e.ids.tolist()[: e.first_target] == prompt and prompt.count(0) == 1
    assert tokenizer.hf.decode(e.ids[e.first_target :], skip_special_tokens=False) == "seven<|im_end|>"


def test_instructions_beside_messages_are_asked_as_these_are(chatty, tmp_path):
    """The style that a run keeps is that of all its rows: what --config repeats, and generation asks in."""
    tokenizer, n = chatty(LLAMA_3), 20
    rows = [dict(instruction=f"apple {i}?", output="seven") for i in range(n)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    chats = [
        {"messages": [CHAT[0], {"role": "user", "content": word}, CHAT[2]]} for word in "apple river stone".split()
    ]
    (tmp_path / "b.json").write_text(json.dumps(chats))
    of_both, again = (
        read_dataset(f"{tmp_path}/a.json,{tmp_path}/b.json", tokenizer, ExampleOptions(style=style, val_fraction=0.2))
        for style in ("alpaca", "chat")
    )
    assert of_both.style == "chat" and len(of_both.train) > n // 2
    assert [e.ids.tolist() for e in of_both.train] == [e.ids.tolist() for e in again.train]


def test_holes_in_what_is_learned_cost_the_loss_nothing_else():
    """A packed row of conversations and plain examples: its loss is that of the learned tokens, one by one."""
    gpt = randomize(model.GPT(model.Config(**LLAMA))).double()
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 97, (n,), generator=rng).int().numpy() for n in (20, 25, 30)]
    flags = torch.rand(25 - 6, generator=rng).numpy() < 0.5
    examples = [Example(ids[0], 4), Example(ids[1], 6, learned=flags), Example(ids[2], 9)]
    loss = sum(gpt(idx, packed) for idx, packed in pack(examples, 1000))
    wanted = 0.0
    for e in examples:
        row = torch.from_numpy(e.ids).long()[None]
        cost = torch.nn.functional.cross_entropy(gpt(row)[0, :-1], row[0, 1:], reduction="none")[e.first_target - 1 :]
        wanted += cost.sum() if e.learned is None else cost[torch.from_numpy(e.learned)].sum()
    torch.testing.assert_close(loss, wanted)
    assert sum(len(p.targets) for _, p in pack(examples, 1000)) == sum(e.n_targets for e in examples)


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot take .* access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "cannot take .* SecurityError"),
        ("{% include '/etc/passwd' %}", "cannot take"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "cannot take"),
        ("{{ 1 / 0 }}", "cannot take .* division by zero"),
        ("{{ '{a}'.format() }}", "cannot take"),
    ],
)
def test_a_template_can_only_write(chatty, template, says):
    tokenizer = chatty(template)
    with pytest.raises(ValueError, match=says):
        learned_turns(tokenizer, "chat", Row(messages=CHAT), Notes())


def test_what_the_assistant_begins_with_or_weighs_nothing_is_not_learned(chatty, tmp_path, capsys):
    def says(content: str, **more) -> dict:
        return dict(role="assistant", content=content, **more)

    ask, begins = CHAT[1], says("apple")
    chats = [[ask], [], [begins, ask, says("seven")], [ask, says("quiet", weight=0), ask, says("seven")],
             [ask, says(" "), ask, says("seven")], [begins, ask], [ask, says("green", weight=0)]]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([{"messages": chat} for chat in chats]))
    tokenizer = chatty(CHATML)
    found = tokenize(read_rows(tmp_path / "a.json"), tokenizer, ExampleOptions(max_length=500))
    learned = [e.ids[e.first_target :] if e.learned is None else e.ids[e.first_target :][e.learned] for e in found]
    assert [tokenizer.hf.decode(ids, skip_special_tokens=False) for ids in learned] == ["seven<|im_end|>"] * 3
    assert "4 of 7 rows left out: they have nothing to learn" in capsys.readouterr().out


def test_messages_as_they_are_found(tmp_path, capsys):
    parts = [{"type": "text", "text": "apple "}, {"type": "text", "text": "river"}]
    turns_of = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}, CHAT[2]]
    rows = [{"conversations": CHAT[1:3], "system": "be kind", "id": 7}, {"conversations": turns_of}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    first, second = (row["messages"] for row in read_rows(tmp_path / "a.json"))
    assert first == [{"role": "system", "content": "be kind"}, *CHAT[1:3]]
    assert [m["role"] for m in second] == ["system", "user", "assistant"] and second[1]["content"] == "apple river"
    assert "1 of 2 rows have keys that are not read: id (first: " in capsys.readouterr().out


def test_tojson_takes_the_options_that_transformers_gives_it(chatty):
    tokenizer = chatty("{{ 'ü' | tojson }}{{ 'ü' | tojson(ensure_ascii=True) }}")
    assert chat_text(tokenizer, "chat", CHAT, asks=True) == '"ü""\\u00fc"'


def test_chats_train_and_the_run_answers_in_the_same_template(chatty, tmp_path, capsys, monkeypatch):
    chatty(LLAMA_3)
    gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 410, "block_size": 512}))
    save_folder(tmp_path / "model", gpt.config, gpt.state_dict(), tokenizer_files(tmp_path / "base"))
    rows = [{"messages": [*CHAT[:-1], {"role": "assistant", "content": f"quiet {i}"}]} for i in range(30)]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    said = say(lora, capsys, monkeypatch, f"--checkpoint_dir {tmp_path}/model --data {tmp_path}/chats.json --out_dir "
               f"{tmp_path}/out --train.batch_size 8 --devices cpu")  # fmt: skip
    assert "29 examples" in said or "28 examples" in said
    assert "style: chat" in (tmp_path / "out/hparams.yaml").read_text()
    args = (
        f"--checkpoint_dir {tmp_path}/model --method_dir {tmp_path}/out --prompt apple --max_new_tokens 2 --device cpu"
    )
    say(base, capsys, monkeypatch, args)
    assert render("chat", "apple", tokenizer=Tokenizer(tmp_path / "model")) == (
        "<bos><|start|>user<|end_of|>\n\napple<|im_end|><|start|>assistant<|end_of|>\n\n"
    )


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% for i in range(99) %}{% for j in range(99) %}{% endfor %}{% endfor %}", "more than 1,000 steps"),
        ("{% for i in range(99) %}{% for j in range(99) if false %}{% endfor %}{% endfor %}", "more than 1,000 steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(12) }}", "1,000 steps"),
        ("{% for i in range(10000000000) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 100000000 }}", "a * 100000000 is refused"),
        ("{% set ns = namespace(x=9) %}{% for i in range(5) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "6561 * 6561"),
        ("{{ 9 ** 999 }}", "9 ** 999 is refused"),
    ],
)
def test_a_template_that_takes_too_much_is_stopped(template, says, chatty, monkeypatch):
    """By counting, so that no clock and no load of the machine decides."""
    monkeypatch.setattr("lit_model.data.chat.MAX_STEPS", 1000)
    tokenizer = chatty(template)
    with pytest.raises(ValueError, match=f"cannot take .*{re.escape(says)}"):
        chat_text(tokenizer, "chat", CHAT[:1], asks=True)


def test_what_a_template_may_take_begins_anew_with_each_conversation(chatty, monkeypatch):
    monkeypatch.setattr("lit_model.data.chat.MAX_STEPS", len(CHAT))
    tokenizer = chatty("{% for m in messages %}{{ m.content * 2 }}{% endfor %}")
    assert [chat_text(tokenizer, "chat", CHAT, asks=True) for _ in range(3)] == [
        "".join(m["content"] * 2 for m in CHAT)
    ] * 3
    with pytest.raises(ValueError, match="more than 5 steps"):
        chat_text(tokenizer, "chat", [*CHAT, CHAT[0]], asks=True)


def test_templates_are_rendered_outside_the_main_thread_too(chatty):
    """No signal, and no limit of the whole process, is set."""
    tokenizer, texts = chatty(LLAMA_3), []
    thread = threading.Thread(target=lambda: texts.append(chat_text(tokenizer, "chat", CHAT, asks=True)))
    thread.start()
    thread.join()
    assert texts == [chat_text(tokenizer, "chat", CHAT, asks=True)]


def test_tools_reach_the_template_and_a_call_is_learned(chatty):
    template = (
        "{% for t in tools or [] %}<|im_start|>{{ t.name }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "stone", "arguments": {}}}]}
    row = {"messages": [{"role": "user", "content": "apple"}, call], "tools": [{"name": "river"}]}
    tokenizer = chatty(template)
    (e,) = tokenize([row], tokenizer, ExampleOptions(style="chat", max_length=500))
    text = tokenizer.hf.decode(e.ids.tolist(), skip_special_tokens=False)
    assert text.startswith("<|im_start|>river\n<|im_start|>user\napple")
    assert tokenizer.hf.decode(e.ids[e.first_target :].tolist(), skip_special_tokens=False) == "stone<|im_end|>"
    with pytest.raises(ValueError, match="the style chatml has no tools"):
        tokenize([row], tokenizer, ExampleOptions(style="chatml", strict=True))
