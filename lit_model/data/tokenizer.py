"""Text to token ids and back: Hugging Face tokenizers (tokenizer.json) or sentencepiece (tokenizer.model), one face."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from lit_model.files import read_json, reading
from lit_model.weights.folder import tokenizer_files

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")  # of ChatML, LLaMA 3, Gemma, Phi


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    bos_id is the token that every text of this family begins with, or None if there is none; bos is a list of it.
    `encode` never adds it, nor any other special token: whoever puts an example together does that, once.
    eos_id ends a response; turn_ends are the texts of it and of the tokens that end a turn of a chat; stop_ids are all
    of these and those at which generation_config.json ends. bos_token is what a chat template writes for BOS.

    Raises FileNotFoundError if the folder has no tokenizer, ValueError if it does not say which token ends a text.
    """

    def __init__(self, folder: Path | str):
        self.folder = folder = Path(folder)
        self._hf = self._sp = None
        if (folder / "tokenizer.json").is_file():
            with reading(folder / "tokenizer.json"):
                self._hf = HFTokenizer.from_file(str(folder / "tokenizer.json"))
                self._hf.no_truncation()  # a file may keep what its last user had set
                self._hf.no_padding()
        elif (folder / "tokenizer.model").is_file():
            with reading(folder / "tokenizer.model"):
                self._sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model")
        self.is_sentencepiece = self._sp is not None
        config = _fields(folder / "special_tokens_map.json") | _fields(folder / "tokenizer_config.json")
        with reading(folder / "tokenizer_config.json"):
            self.chat_template = _chat_template(folder, config)
            bos, eos = self._bos_and_eos(config)
            adds_bos = config.get("add_bos_token", self.is_sentencepiece or self._hf.encode("").ids[:1] == [bos])
            token_of = self._sp.id_to_piece if self.is_sentencepiece else self._hf.id_to_token
            if eos is None or token_of(eos) is None:
                raise ValueError("it must name the eos_token, the token that ends a text")
            self.eos_id, self.eos_token = eos, token_of(eos)
            self.bos_token = None if bos is None else token_of(bos)
            self.bos = [bos] if adds_bos and bos is not None else []
            self.bos_id = bos if self.bos else None
            self.turn_ends = [self.eos_token, *(token for token in TURN_ENDS if self._id(token) not in (None, eos))]
        with reading(folder / "generation_config.json"):
            ends = _listed(_fields(folder / "generation_config.json").get("eos_token_id"))
            ends = [self._id(token) for token in self.turn_ends] + [int(i) for i in ends]
            self.stop_ids: list[int] = list(dict.fromkeys(ends))

    def _bos_and_eos(self, config: dict[str, Any]) -> tuple[int | None, int | None]:
        if self._sp is not None:
            bos, eos = (None if i < 0 else i for i in (self._sp.bos_id(), self._sp.eos_id()))
            return bos, eos
        bos, eos = (self._id(config.get(f"{kind}_token")) for kind in ("bos", "eos"))
        if "eos_token" not in config:  # GPT-2's own repository has only its number
            eos = next(iter(_listed(_fields(self.folder / "config.json").get("eos_token_id"))), None)
        return bos, eos

    def _id(self, token: str | dict | None) -> int | None:
        if isinstance(token, dict):  # an AddedToken, written out
            token = token["content"]
        if token is None or self._hf is not None:
            return None if token is None else self._hf.token_to_id(token)
        i = self._sp.piece_to_id(token)
        return None if i == self._sp.unk_id() else i

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with reading(self.folder):  # its expressions may fail on a text
            if self._sp is not None:
                return self._sp.encode(list(texts))
            return [e.ids for e in self._hf.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_within(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as each stands behind another one: LLaMA's tokenizers put a space in front of what begins."""
        within = self._behind("\n", texts)
        if None in within:  # two line ends may be one token, and so may letters
            ways = zip(within, self._behind("a", texts), self.encode_batch(texts))
            within = [next(ids for ids in of_text if ids is not None) for of_text in ways]
        return within

    def _behind(self, before: str, texts: Sequence[str]) -> list[list[int] | None]:
        """None where a token spans the boundary."""
        first, *whole = self.encode_batch([before, *(before + text for text in texts)])
        n = len(first)
        return [ids[n:] if ids[:n] == first else None for ids in whole]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        if self._sp is not None:
            n = self._sp.get_piece_size()
            return self._sp.decode([i for i in ids if i < n])  # a network may have rows for more
        return self._hf.decode(list(ids), skip_special_tokens=True)

    def add(self, texts: Sequence[str]) -> list[int]:
        """Makes each text a token, wherever it stands in another one. Returns their ids; one that exists keeps its own.

        Raises ValueError for sentencepiece.
        """
        if self._hf is None:
            raise ValueError(f"{self.folder}: tokens can be added to a tokenizer.json, and this is a tokenizer.model")
        self._hf.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
        return [self._hf.token_to_id(text) for text in texts]

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files in its folder, with the tokens that were added."""
        return tokenizer_files(self.folder) | {"tokenizer.json": self._hf.to_str(pretty=True).encode()}


def _fields(path: Path) -> dict[str, Any]:
    """The fields of a file that may be missing, without those that are null."""
    return {key: value for key, value in read_json(path).items() if value is not None} if path.is_file() else {}


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path, template = folder / "chat_template.jinja", config.get("chat_template")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(template, list):  # several with names
        return next((one["template"] for one in template if one["name"] == "default"), None)
    return template
