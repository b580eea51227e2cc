"""The same ids as transformers and sentencepiece, on 500 strings of every kind; BOS once; the tokens that end a turn.
Run with -s to see the counts."""

import json
import random
import shutil

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_model.data.examples import ExampleOptions, tokenize
from lit_model.data.tokenizer import Tokenizer
from lit_model.weights import demo as hub
from lit_model.weights.sentencepiece import read_model

SENTENCEPIECE = hub.Asset(
    "mistral-common==1.13.1",
    "mistral_common/data/tokenizer.model.v1",
    "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "a sentencepiece model of 32,000 pieces (Apache-2.0), 6.6 MB, from the Python package mistral-common 1.13.1",
)
POOLS = [
    "the quick brown fox jumps over a lazy dog , . ! ? ' \" - ( )".split(),
    ["def f(x):", "\n    return", " x**2", "\t", "#!/bin/sh", "{}", "=>", "&&", "\\n", "/* */", "0x1F", "a_b.c[0]"],
    ["日本語", "中文", "한국어", "ไทย", "العربية", "עברית", "हिन्दी", "русский", "ελληνικά", "ß", "ﬁ", "Å", "Å", "ñ"],
    ["🙂", "👩‍👩‍👧", "🇩🇪", "❤️", "\u200d", "\ufe0f", "𝔘", "𐍈", "\u0301", "�"],
    [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t\t", "\u00a0", "\u3000", "\u2028", "\v"],
    ["1", "42", "1984", "3.14159", "1,000,000", "½", "②", "٣", "10^-6", "$5", "50%"],
    ["<|im_start|>", "<s>", "</s>", "<unk>", "[INST]", "<0x0A>", "▁", "Ġ"],
]


def strings() -> list[str]:
    rng = random.Random(0)
    texts = [piece for pool in POOLS for piece in pool] + ["", "a" * 300, "no" + " " * 40 + "gap"]
    while len(texts) < 500:
        pools = rng.sample(POOLS[:-1], rng.randint(1, 3))
        between = rng.choice(["", " ", "\n"])
        texts.append(between.join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 20))))
    return texts


def test_ids_of_tokenizer_json_equal_transformers(tiny):
    checkpoints = [tiny / "base"] + [c for c in [hub.DEMO_CHECKPOINT] if (c / "tokenizer.json").is_file()]
    for folder in checkpoints:
        ours, theirs = Tokenizer(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        same = [ours.encode(s) == theirs.encode(s, add_special_tokens=False) for s in strings()]
        print(f"{folder.name}: {sum(same)} of {len(same)} strings as transformers")
        assert all(same)
        assert all(ours.decode(ours.encode(s)) == s for s in strings() if "<|im_start|>" not in s)


def test_what_a_file_says_of_truncation_and_padding_counts_for_nothing(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "x")
    theirs = HFTokenizer.from_file(str(tiny / "base/tokenizer.json"))
    theirs.enable_truncation(8)
    theirs.enable_padding(length=8)
    theirs.save(str(tmp_path / "x/tokenizer.json"))
    texts = ["apple", "apple river stone " * 9]
    assert [len(e.ids) for e in theirs.encode_batch(texts)] == [8, 8]
    ours, plain = Tokenizer(tmp_path / "x"), Tokenizer(tiny / "base")
    assert [ours.encode(text) for text in texts] == [plain.encode(text) for text in texts]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A folder with a tokenizer.model of 32,000 pieces."""
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "download").mkdir()
    shutil.move(hub.fetch(SENTENCEPIECE, folder / "download"), folder / "tokenizer.model")
    return folder


def test_ids_of_sentencepiece_equal_its_own(mistral):
    """Of texts without special tokens, which sentencepiece spells out in characters."""
    theirs = SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
    ours, *ends = read_model(mistral / "tokenizer.model")
    texts = [s for s in strings() if not any(token in s for token in ("<s>", "</s>", "<unk>", "<0x0A>"))]
    same = [ours.encode(s).ids == theirs.encode(s) for s in texts]
    print(f"sentencepiece: {sum(same)} of {len(same)} strings as sentencepiece")
    assert all(same) and ends == [1, 2] and len(texts) > 480
    assert ours.decode(ours.encode("Ünïcode 日本 🙂").ids) == "Ünïcode 日本 🙂"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_a_model_of_every_kind_is_read(kind, rule, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(s for s in strings()[:60] if s.isascii()) * 5)
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=360, minloglevel=2,
        model_type=kind, byte_fallback=True, hard_vocab_limit=False, remove_extra_whitespaces=False,
        normalization_rule_name=rule,
    )  # fmt: skip
    theirs, (ours, *_) = (
        SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")),
        read_model(tmp_path / "tokenizer.model"),
    )
    for text in ("the lazy dog", "x ** 2", " jumps over", "ﬁ ½ é 日本 🙂"):
        assert ours.encode(text).ids == theirs.encode(text), text


@pytest.mark.parametrize("stated", [
    {}, dict(add_bos_token=True), dict(legacy=True), dict(legacy=False), dict(add_prefix_space=False),
    dict(eos_token="<b>", added_tokens_decoder={"32000": dict(content="<a>", lstrip=True, special=False),
                                                "32001": dict(content="<b>", rstrip=True, special=True)}),
])  # fmt: skip
def test_ids_of_a_tokenizer_model_equal_transformers(stated, mistral, tmp_path):
    """With the tokens that were added to it, in the two files that may name them."""
    shutil.copy(mistral / "tokenizer.model", tmp_path)
    stated = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>") | dict(eos_token="</s>") | stated
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if "legacy" in stated:
        (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 32000, "[INST]": 32001}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    plain = [
        s for s in strings() if "  " not in s
    ]  # transformers 5 merges runs of spaces by id, sentencepiece by score
    texts = [
        *plain,
        *(f"{a}{token} {b}" for token in ("<a>", "<b>", "</s>", "[INST]") for a, b in ("ab", ("", "c"))),
    ]
    same = [ours.encode(s) == theirs.encode(s, add_special_tokens=False) for s in texts]
    print(f"{stated}: {sum(same)} of {len(same)} strings as transformers")
    assert all(same) and ours.eos_id == theirs.eos_token_id and ours.bos + ours.encode("a") == theirs.encode("a")
    assert [ours.decode(ours.encode(s)) for s in texts] == [
        theirs.decode(theirs.encode(s, add_special_tokens=False), skip_special_tokens=True) for s in texts
    ]
    reopened = tmp_path / "again"
    reopened.mkdir()
    for name, content in ours.files().items():
        (reopened / name).write_bytes(content)
    again = Tokenizer(reopened)
    assert (again.bos, again.eos_id) == (ours.bos, ours.eos_id) and all(
        again.encode(s) == ours.encode(s) for s in texts
    )


def test_an_added_token_that_cannot_have_its_id_is_named(mistral, tmp_path):
    shutil.copy(mistral / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a>": 32007}')
    with pytest.raises(ValueError, match="the added token '<a>' cannot have the id 32007"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("before, text, pieces", [("Say it:\n", "Apple", "Apple"), ("[/INST]", " apple", "▁apple")])
def test_what_stands_behind_a_text_is_tokenized_as_in_one(mistral, before, text, pieces):
    tokenizer = Tokenizer(mistral)
    ids = tokenizer.encode_after(before, text)
    assert tokenizer.encode(before + text)[-len(ids) :] == ids
    assert "".join(map(tokenizer.hf.id_to_token, ids)) == pieces
    row = dict(prompt=before, completion=text)
    (e,) = tokenize([row], tokenizer, ExampleOptions())
    assert e.ids[e.first_target :].tolist() == [*ids, 2] and e.ids[0] == tokenizer.bos_id


def test_a_run_of_tokens_ends_where_generation_config_says(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "x")
    for ends, more in ((7, [7]), ([1, 9, 7], [9, 7]), (None, [])):
        (tmp_path / "x/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        ours = Tokenizer(tmp_path / "x")
        assert ours.stop_ids == [*Tokenizer(tiny / "base").stop_ids, *more] and ours.eos_id == 1
    (tmp_path / "x/generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(ValueError, match="generation_config.json: invalid literal for int"):
        Tokenizer(tmp_path / "x")


def test_bos_may_be_named_in_special_tokens_map_only(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "x")
    stated = tmp_path / "x/tokenizer_config.json"
    config = json.loads(stated.read_text())
    tokens = {name: config.pop(name) for name in ("bos_token", "eos_token")}
    (tmp_path / "x/special_tokens_map.json").write_text(json.dumps(tokens))
    stated.write_text(json.dumps(config | {"bos_token": None}))
    ours, before = Tokenizer(tmp_path / "x"), Tokenizer(tiny / "base")
    assert (ours.bos, ours.eos_id, ours.bos_token) == (before.bos, before.eos_id, "<bos>")


@pytest.mark.parametrize("kept_in", ["json", "list", "jinja"])
def test_the_chat_template_is_found_wherever_transformers_keeps_it(tiny, tmp_path, kept_in):
    shutil.copytree(tiny / "base", tmp_path / "x")
    stated = json.loads((tmp_path / "x/tokenizer_config.json").read_text())
    if kept_in == "jinja":
        (tmp_path / "x/chat_template.jinja").write_text("{{ 1 }}")
    else:
        several = [{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 1 }}"}]
        stated["chat_template"] = "{{ 1 }}" if kept_in == "json" else several
    (tmp_path / "x/tokenizer_config.json").write_text(json.dumps(stated))
    assert Tokenizer(tmp_path / "x").chat_template == "{{ 1 }}"


@pytest.mark.parametrize("files", ["no name in tokenizer_config.json", "no tokenizer_config.json"])
def test_the_end_of_text_may_be_named_by_its_number_only(tiny, tmp_path, files):
    """As in GPT-2's own repository, and in what older versions of transformers wrote."""
    shutil.copytree(tiny / "base", tmp_path / "x")
    (tmp_path / "x/tokenizer_config.json").unlink()
    if files.startswith("no name"):
        (tmp_path / "x/tokenizer_config.json").write_text('{"model_max_length": 1024}')
    for ends in (1, [1, 7]):
        (tmp_path / "x/config.json").write_text(json.dumps({"eos_token_id": ends, "bos_token_id": 0}))
        ours = Tokenizer(tmp_path / "x")
        assert (ours.eos_id, ours.eos_token, ours.bos) == (1, "<eos>", [])
        assert ours.stop_ids == ([1, 7] if ends == [1, 7] else [1])
    for config in ({"eos_token_id": 9999}, {"eos_token_id": "<eos>"}, {}):
        (tmp_path / "x/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="tokenizer_config.json: "):
            Tokenizer(tmp_path / "x")
    (tmp_path / "x/tokenizer_config.json").write_text('{"eos_token": "nothing"}')
    with pytest.raises(ValueError, match="tokenizer_config.json: it must name the eos_token"):
        Tokenizer(tmp_path / "x")


def test_a_folder_without_a_tokenizer_and_a_broken_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither tokenizer.json nor tokenizer.model"):
        Tokenizer(tmp_path)
    for name, content in (("tokenizer.model", "hello"), ("tokenizer.json", '{"model": ')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="it is broken or only partly written") as error:
            Tokenizer(tmp_path)
        assert name in str(error.value)
