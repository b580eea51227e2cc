"""What is exported answers elsewhere as it does here: GGUF files in a real llama.cpp."""

import pytest
import torch
from conftest import randomize
from test_convert import OTHERS, SIZES, TEXTS, bpe_fields
from test_convert import write_gguf as write_by_hand

from lit_model import GPT, Config
from lit_model.data.tokenizer import Tokenizer
from lit_model.weights.folder import Folder
from lit_model.weights.gguf import convert_gguf
from lit_model.weights.to_gguf import write_gguf


def folder_of(name: str, tiny, tmp_path):
    """A folder of another architecture, whose tokenizer has the rule that it usually has."""
    shape, fields, rule = OTHERS[name]
    gpt = randomize(GPT(Config(**SIZES | shape | dict(vocab_size=400))), std=0.1).eval()
    arch = name.split("-")[0]
    write_by_hand(tmp_path / "m.gguf", gpt, bpe_fields(tiny) | {"ggml.pre": rule}, arch=arch, fields=fields)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", torch.float32)
    return tmp_path / "hf"


@pytest.mark.parametrize("name", OTHERS)
def test_a_gguf_file_is_read_as_what_it_was_written_from(name, tiny, tmp_path):
    folder = folder_of(name, tiny, tmp_path)
    write_gguf(tmp_path / "out.gguf", Folder(folder), "F32")
    convert_gguf(tmp_path / "out.gguf", tmp_path / "again", torch.float32)
    before, after = Folder(folder), Folder(tmp_path / "again")
    assert after.config == before.config
    for tensor in before.names:
        torch.testing.assert_close(after.tensor(tensor), before.tensor(tensor), rtol=0, atol=1e-6)
    ours, theirs = Tokenizer(folder), Tokenizer(tmp_path / "again")
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.bos_id, ours.stop_ids, ours.chat_template) == (theirs.bos_id, theirs.stop_ids, theirs.chat_template)
