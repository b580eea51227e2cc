"""sentencepiece's models as tokenizers of the tokenizers library: from a tokenizer.model, or from a GGUF file's fields.

Its rule for spaces is one of four: "▁" is put before every text that stands between special tokens (prepend), unless
the text begins with a space (always), or so before the first one only (first), or nowhere (never).
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models


def read_model(path: Path, spaces: str = "prepend") -> tuple[Tokenizer, int, int]:
    """(tokenizer, id of BOS, id of EOS) of a tokenizer.model; -1 for a token that it does not have.

    Raises ValueError if it is no model of sentencepiece, or neither BPE nor unigram.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    spec, pieces = model.trainer_spec, [(p.piece, p.score, p.type) for p in model.pieces]
    if spec.model_type not in (UNIGRAM, BPE):
        raise ValueError("its pieces are neither BPE nor unigram")
    tokenizer = tokenizer_of(*zip(*pieces), spaces if model.normalizer_spec.add_dummy_prefix else "never")
    if spec.model_type == UNIGRAM:
        tokenizer.model = models.Unigram([piece[:2] for piece in pieces], spec.unk_id, spec.byte_fallback)
    if model.normalizer_spec.precompiled_charsmap:
        characters = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
        tokenizer.normalizer = normalizers.Sequence([characters, *filter(None, [tokenizer.normalizer])])
    return tokenizer, spec.bos_id, spec.eos_id


def tokenizer_of(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], spaces: str) -> Tokenizer:
    """BPE whose pairs merge in the order of the scores of what they make; of pairs that make the same piece the one
    with the longer left part is first, which gives sentencepiece's own ids."""
    typed = zip(tokens, scores, kinds, strict=True)
    plain = {token: score for token, score, kind in typed if kind == NORMAL and len(token) < 256}  # none is longer
    merges = [
        (-score, -i, token[:i], token[i:])
        for token, score in plain.items() for i in range(1, len(token)) if token[:i] in plain and token[i:] in plain
    ]  # fmt: skip
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    vocabulary = {t: i for i, t in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=spaces, split=False)
    strip = [] if spaces == "never" else [decoders.Strip(" ", 1, 0)]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return with_added_tokens(tokenizer, tokens, kinds)


def with_added_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    """Tokens that are found in a text before anything merges; special ones are left out of decoded text."""
    kind_of = [(t, kind) for t, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=kind != USER_DEFINED) for t, kind in kind_of])
    return tokenizer


def begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Has every text begin with a token."""
    texts = f"{token} $A", f"{token} $A {token} $B"  # of one text and of two
    tokenizer.post_processor = processors.TemplateProcessing(*texts, [(token, tokenizer.token_to_id(token))])
