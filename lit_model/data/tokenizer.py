"""Text to token ids and back: a checkpoint folder's tokenizer.json, or sentencepiece's tokenizer.model."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from lit_model.files import read_json, reading
from lit_model.weights.folder import tokenizer_files

BATCH = 256  # texts that are tokenized at a time
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")  # of ChatML, LLaMA 3, Gemma, Phi


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    bos_id is the token that every text of this family begins with, or None if there is none; bos is a list of it.
    `encode` never adds it, nor any other special token: whoever puts an example together does that, once.
    eos_id ends a response. stop_ids are the tokens that end a text or a turn of a chat: EOS, those that are known to,
    and those at which generation_config.json and config.json end; turn_ends are their texts. A chat template is given
    bos_token, eos_token and now, the time that it may tell.

    Raises FileNotFoundError if the folder has no tokenizer, ValueError if it does not say which token ends a text.
    """

    def __init__(self, folder: Path | str):
        self.folder = folder = Path(folder)
        self.now = datetime.now()
        config = _fields(folder / "special_tokens_map.json") | _fields(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            with reading(folder / "tokenizer.json"):
                self.hf = HFTokenizer.from_file(str(folder / "tokenizer.json"))
                self.hf.no_truncation()  # a file may keep what its last user had set
                self.hf.no_padding()
        elif (folder / "tokenizer.model").is_file():
            with reading(folder / "tokenizer.model"):
                self.hf = _of_sentencepiece(folder, config)
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model")
        files = "generation_config.json", "config.json"
        stated = {name: _fields(folder / name).get("eos_token_id", []) for name in files}
        ends = {name: ids if isinstance(ids, list) else [ids] for name, ids in stated.items()}
        with reading(folder / "tokenizer_config.json"):
            self.chat_template = _chat_template(folder, config)
            bos, eos = (self._id(config.get(f"{kind}_token")) for kind in ("bos", "eos"))
            if "eos_token" not in config:  # GPT-2's own repository has only its number
                eos = next(iter(ends["config.json"]), None)
            if eos is None or self.hf.id_to_token(eos) is None:
                raise ValueError("it must name the eos_token, the token that ends a text")
            self.eos_id, self.eos_token = eos, self.hf.id_to_token(eos)
            self.bos_token = None if bos is None else self.hf.id_to_token(bos)
            self.bos = [bos] if bos is not None and self.hf.encode("").ids[:1] == [bos] else []
            self.bos_id = bos if self.bos else None
        self.stop_ids = [eos, *(i for token in TURN_ENDS if (i := self._id(token)) is not None)]
        for name, ids in ends.items():
            with reading(folder / name):
                self.stop_ids += [int(i) for i in ids]
        self.stop_ids = list(dict.fromkeys(self.stop_ids))
        added = {eos, *self.hf.get_added_tokens_decoder()}
        self.turn_ends = [self.hf.id_to_token(i) for i in self.stop_ids if i in added]

    def _id(self, token: str | dict | None) -> int | None:
        token = token["content"] if isinstance(token, dict) else token  # an AddedToken, written out
        return None if token is None else self.hf.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        with reading(self.folder):  # its expressions may fail on a text
            return self.hf.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids (n,), and where in it each token stands (n,): at its last character, or, if it is an
        added token, which may have swallowed the spaces behind it, at its first."""
        texts, added = iter(texts), np.array([*self.hf.get_added_tokens_decoder()], dtype=int)
        while batch := list(islice(texts, BATCH)):
            with reading(self.folder):
                encoded = self.hf.encode_batch(batch, add_special_tokens=False)
            for e in encoded:
                ids, (starts, ends) = np.array(e.ids, dtype=int), np.array(e.offsets, dtype=int).reshape(-1, 2).T
                yield ids, np.where(np.isin(ids, added), starts, ends - 1)

    def token_start(self, text: str, i: int) -> int:
        """Where the token begins that the character i of a text lies in."""
        encoding = self.hf.encode(text, add_special_tokens=False)
        token = encoding.char_to_token(i)
        return i if token is None else encoding.token_to_chars(token)[0]

    def encode_after(self, before: str, text: str) -> list[int]:
        """Ids of what stands behind `before` in one text: LLaMA's tokenizers put a space in front of what begins."""
        ((ids, places),) = self.encode_with_places([before + text])
        return ids[places >= len(before)].tolist()

    def special_ids(self, texts: Sequence[str]) -> list[int]:
        """Ids of those texts that are special tokens, which no decoded text holds."""
        special = {token.content: i for i, token in self.hf.get_added_tokens_decoder().items() if token.special}
        return [special[text] for text in texts if text in special]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of the ids, without special tokens unless these are wanted."""
        return self.hf.decode(list(ids), skip_special_tokens=not special)

    def add(self, texts: Sequence[str]) -> list[int]:
        """Makes each text a token, wherever it stands in another one. Returns their ids; one that exists keeps its
        own."""
        self.hf.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
        return [self.hf.token_to_id(text) for text in texts]

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files in its folder, with the tokens that were added."""
        files = tokenizer_files(self.folder) | {"tokenizer.json": self.hf.to_str(pretty=True).encode()}
        return {name: content for name, content in files.items() if name != "tokenizer.model"}  # which lacks these


def _of_sentencepiece(folder: Path, config: dict[str, Any]) -> HFTokenizer:
    """As transformers' LlamaTokenizer reads tokenizer.model, with the tokens that were added to it. Puts into `config`
    what only the model says."""
    from lit_model.weights.sentencepiece import begin_with, read_model

    spaces = "always" if config.get("legacy") else "first" if config.get("add_prefix_space", True) else "never"
    tokenizer, bos, eos = read_model(folder / "tokenizer.model", spaces)
    adds_bos = config.get("add_bos_token", not config)  # LLaMA's first folders state nothing
    for name, i in ("bos_token", bos), ("eos_token", eos):
        config.setdefault(name, tokenizer.id_to_token(i) if i >= 0 else None)
    added = {int(i): {"content": text} for text, i in _fields(folder / "added_tokens.json").items()}
    added |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    for i, token in sorted(added.items()):
        flags = {
            key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in token
        }
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != i:
            raise ValueError(f"the added token {token['content']!r} cannot have the id {i}")
    if adds_bos and config["bos_token"]:
        begin_with(tokenizer, config["bos_token"])
    return tokenizer


def _fields(path: Path) -> dict[str, Any]:
    """The fields of a file that may be missing, without those that are null."""
    return {key: value for key, value in read_json(path).items() if value is not None} if path.is_file() else {}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path, template = folder / "chat_template.jinja", config.get("chat_template")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(template, list):  # several with names
        return next((one["template"] for one in template if one["name"] == "default"), None)
    return template
