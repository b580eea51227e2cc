"""Text to token ids and back: sentencepiece (tokenizer.model) or Hugging Face tokenizers (tokenizer.json), one face."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as HFTokenizer

from lit_model.files import blamed_on, read_json

FILES = (  # of a checkpoint folder, with what they say about tokens
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")  # of ChatML, LLaMA 3, Gemma, Phi


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    bos_id is the token that every text of this family begins with, or None if there is none; bos is a list of it.
    `encode` never adds it, nor any other special token: whoever puts an example together does that, once.
    eos_id ends a response; turn_ends are the texts of it and of the tokens that end a turn of a chat; stop_ids are all
    of these and those at which generation_config.json ends. bos_token is what a chat template writes for BOS.

    Raises FileNotFoundError if the folder has no tokenizer, ValueError if it does not say which token ends a text.
    """

    def __init__(self, checkpoint_dir: Path | str):
        self.folder = folder = Path(checkpoint_dir)
        stated = folder / "tokenizer_config.json"
        parts = [read_json(path) for path in (folder / "special_tokens_map.json", stated) if path.is_file()]
        config = {name: value for part in parts for name, value in part.items() if value is not None}
        with blamed_on(stated):
            self._read(folder, stated, config)
        path = folder / "generation_config.json"
        with blamed_on(path):
            ends = read_json(path).get("eos_token_id") if path.is_file() else None
            ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
            if not all(type(i) is int and i >= 0 for i in ends):
                raise ValueError(f"eos_token_id is {ends}, and no number of a token")
            self.stop_ids = list(dict.fromkeys([*self.stop_ids, *ends]))

    def _read(self, folder: Path, stated: Path, config: dict) -> None:
        self.chat_template = _chat_template(folder, config)
        contents = [(folder / name).read_bytes() for name in FILES[:-1] if (folder / name).is_file()]
        self.fingerprint = hashlib.sha256(b"".join(contents)).hexdigest()
        self._hf = self._sp = None
        if (folder / "tokenizer.json").is_file():
            try:
                self._hf = HFTokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as e:  # tokenizers raises nothing more special
                raise ValueError(f"{folder / 'tokenizer.json'} is broken or only partly written ({e})") from None
            self._hf.no_truncation()  # a file may keep what its last user had set
            self._hf.no_padding()
            bos, eos = (self._id(config.get(f"{kind}_token")) for kind in ("bos", "eos"))
            adds_bos = config.get("add_bos_token", self._hf.encode("").ids[:1] == [bos])
        elif (folder / "tokenizer.model").is_file():
            try:
                self._sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            except (RuntimeError, OSError) as e:
                raise ValueError(f"{folder / 'tokenizer.model'} is broken or only partly written ({e})") from None
            bos, eos = self._sp.bos_id(), self._sp.eos_id()
            adds_bos = config.get("add_bos_token", True)
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model")
        if eos is None or eos < 0:
            raise ValueError(f"{stated} must name the eos_token, the token that ends a text")
        self.eos_id: int = eos
        self.bos_id: int | None = bos if adds_bos and bos is not None and bos >= 0 else None
        self.bos = [] if self.bos_id is None else [self.bos_id]
        self.is_sentencepiece = self._sp is not None
        token_of = self._hf.id_to_token if self._sp is None else self._sp.id_to_piece
        self.eos_token, self.bos_token = token_of(eos), None if bos is None or bos < 0 else token_of(bos)
        ends = {self.eos_token: eos} | {token: self._id(token) for token in TURN_ENDS}
        ends = {token: i for token, i in ends.items() if i is not None}
        self.turn_ends, self.stop_ids = list(ends), list(dict.fromkeys(ends.values()))

    def _id(self, token: str | dict | None) -> int | None:
        if isinstance(token, dict):  # an AddedToken, written out
            token = token["content"]
        if token is None or self._sp is None:
            return None if token is None else self._hf.token_to_id(token)
        i = self._sp.piece_to_id(token)
        return None if i == self._sp.unk_id() else i

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_within(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as each stands behind another one: LLaMA's tokenizers put a space in front of what begins."""
        found = self._behind("\n", texts)
        if None in found:  # two line ends may be one token, and so may letters
            ways = zip(found, self._behind("a", texts), self.encode_batch(texts))
            found = [next(ids for ids in of_text if ids is not None) for of_text in ways]
        return found

    def _behind(self, before: str, texts: Sequence[str]) -> list[list[int] | None]:
        """None where a token spans the boundary."""
        first, *whole = self.encode_batch([before, *(before + text for text in texts)])
        n = len(first)
        return [ids[n:] if ids[:n] == first else None for ids in whole]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with blamed_on(self.folder):  # its expressions may fail on a text
            if self._sp is not None:
                return self._sp.encode(list(texts))
            return [e.ids for e in self._hf.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        if self._sp is not None:
            n = self._sp.get_piece_size()
            return self._sp.decode([i for i in ids if i < n])  # a network may have rows for more
        return self._hf.decode(list(ids), skip_special_tokens=True)


def _chat_template(folder: Path, config: dict) -> str | None:
    path, stated = folder / "chat_template.jinja", config.get("chat_template")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(stated, list):  # several with names
        stated = next((one["template"] for one in stated if one.get("name") == "default"), None)
    if not isinstance(stated, str | None):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return stated
