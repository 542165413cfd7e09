"""The tokenizer that a GGUF file describes, as an object of the ``tokenizers`` library.

A file names its algorithm (``tokenizer.ggml.model``) and, for byte-level BPE, how text is cut up
beforehand (``tokenizer.ggml.pre``), and lists tokens, token types and merges. Both names stand for
code that the file does not carry. What they mean is written down here once, and a name that is not
here is refused: another pre-tokenizer's regular expression would give plausible ids, and a model
that is a little worse for no visible reason.

The rules are those of the models' own ``tokenizer.json`` files, the ones that were used in
training; llama.cpp's tables (``src/llama-vocab.cpp``) name the same rules and were compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from headway.core.errors import DamagedModel, UnsupportedModel
from headway.models.gguf_metadata import GGUFMetadata

__all__ = ["TokenType", "Vocabulary", "build_codec", "read_vocabulary"]

#: What stands for a space in the tokens of a SentencePiece vocabulary.
SPACE_MARK: Final = "\u2581"


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``: what a token of the vocabulary is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Almost every token is of this type; a plain int keeps the enum out of the loop over them.
_NORMAL: Final = int(TokenType.NORMAL)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file, checked: as many types as tokens, and no id outside of them.

    ``byte_level`` tells the two families apart: tokens are spelled in GPT-2's alphabet of 256
    printable characters, one a byte (``gpt2``), or as text with ``▁`` for spaces (``llama``).
    ``add_space_prefix`` says that a text is encoded as if a space came before it, and
    ``add_bos_token`` that its ids begin with the BOS token.
    """

    tokens: list[str]
    types: list[int]
    byte_level: bool
    pre_tokenizer: str
    add_space_prefix: bool
    add_bos_token: bool


def read_vocabulary(metadata: GGUFMetadata) -> Vocabulary:
    """Read the vocabulary of a file.

    Raises:
        UnsupportedModel: the tokenizer model, or its pre-tokenizer, is not one we know.
        DamagedModel: the arrays are missing or contradict each other.
    """
    model = metadata.string("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{metadata.path}: tokenizer model {model!r} is not supported (gpt2 and llama are)"
        )
    byte_level = model == "gpt2"
    pre_tokenizer = metadata.string("tokenizer.ggml.pre", "default") if byte_level else ""
    if byte_level and pre_tokenizer not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise UnsupportedModel(
            f"{metadata.path}: pre-tokenizer {pre_tokenizer!r} is not supported (known: {known})"
        )
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise DamagedModel(f"{metadata.path}: the vocabulary is empty")
    types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata.values:
        types = metadata.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise DamagedModel(f"{metadata.path}: {len(tokens)} tokens, but {len(types)} token types")
    prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", not byte_level)
    starts_with_bos = _PRE_TOKENIZERS[pre_tokenizer].add_bos if byte_level else True
    return Vocabulary(
        tokens=tokens,
        types=types,
        byte_level=byte_level,
        pre_tokenizer=pre_tokenizer,
        add_space_prefix=prefix and not byte_level,
        add_bos_token=metadata.boolean("tokenizer.ggml.add_bos_token", starts_with_bos),
    )


def build_codec(
    metadata: GGUFMetadata, vocabulary: Vocabulary
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Build two encoders over one model: one that recognises control tokens in text, one that not.

    Both recognise the file's user-defined tokens. The two share the vocabulary's memory. Encoding
    never changes an encoder, so both may be used from several threads.

    Raises:
        DamagedModel: a merge or a score does not fit the vocabulary.
    """
    build = _byte_level_bpe if vocabulary.byte_level else _sentencepiece_bpe
    parsing = build(metadata, vocabulary)
    literal = tokenizers.Tokenizer(parsing.model)
    if parsing.normalizer is not None:
        literal.normalizer = parsing.normalizer
    if parsing.pre_tokenizer is not None:
        literal.pre_tokenizer = parsing.pre_tokenizer
    control, user_defined = [], []
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == _NORMAL or not text:
            continue
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            control.append(AddedToken(text, special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED:
            user_defined.append(AddedToken(text, special=False, normalized=False))
    parsing.add_special_tokens(control)
    parsing.add_tokens(user_defined)
    literal.add_tokens(user_defined)
    return parsing, literal


# --- byte-level BPE (tokenizer.ggml.model = gpt2) -------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """What one value of ``tokenizer.ggml.pre`` stands for.

    ``ignore_merges``: a piece that is a token as a whole is not put together from merges (tiktoken
    vocabularies, in which some tokens cannot be reached by merging). ``add_bos``: whether a text
    begins with the BOS token when the file does not say.
    """

    split: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _gpt2_single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(expression: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(expression), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


# The GPT-4 family: contractions, a word with the one mark before it, numbers, punctuation with the
# newlines after it, newlines, other white space. The members differ in how long a number may be and
# in whether combining marks belong to the word.
_TAIL: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3: Final = _WORDS + r"|\p{N}{1,3}" + _SIGNS + _TAIL
_QWEN2: Final = _WORDS + r"|\p{N}" + _SIGNS + _TAIL
_QWEN35: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
)

_PRE_TOKENIZERS: Final[Mapping[str, _Rule]] = {
    "default": _Rule(_gpt2),
    "gpt-2": _Rule(_gpt2),
    "smollm": _Rule(_gpt2_single_digits),
    "starcoder": _Rule(_gpt2_single_digits),
    "refact": _Rule(_gpt2_single_digits),
    "qwen2": _Rule(_split(_QWEN2), nfc=True),
    "deepseek-r1-qwen": _Rule(_split(_QWEN2), nfc=True),
    "qwen35": _Rule(_split(_QWEN35), nfc=True),
    "llama-bpe": _Rule(_split(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama3": _Rule(_split(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama-v3": _Rule(_split(_LLAMA3), ignore_merges=True, add_bos=True),
}


def _byte_level_bpe(metadata: GGUFMetadata, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    rule = _PRE_TOKENIZERS[vocabulary.pre_tokenizer]
    merges = []
    for merge in metadata.strings("tokenizer.ggml.merges"):
        left, separator, right = merge.partition(" ")
        if not separator or not left or not right or " " in right:
            raise DamagedModel(f"{metadata.path}: merge {merge[:80]!r} is not a pair")
        merges.append((left, right))
    codec = tokenizers.Tokenizer(
        _bpe(metadata, _ids(vocabulary), merges, ignore_merges=rule.ignore_merges)
    )
    codec.pre_tokenizer = rule.split()
    if rule.nfc:
        codec.normalizer = normalizers.NFC()
    return codec


# --- SentencePiece BPE (tokenizer.ggml.model = llama) ---------------------------------------------


def _sentencepiece_bpe(metadata: GGUFMetadata, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """BPE whose merges follow from the scores, with bytes for what the vocabulary cannot spell.

    SentencePiece joins the neighbours whose union has the best score. Listing every pair of tokens
    whose union is a token, best union first, gives the same joins to a BPE that knows ranks only
    (the conversion of ``transformers``' Llama tokenizers).
    """
    ids = _ids(vocabulary)
    scores = metadata.floats("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise DamagedModel(
            f"{metadata.path}: {len(vocabulary.tokens)} tokens, but {len(scores)} scores"
        )
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(vocabulary.tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    ranked.sort()
    merges = [(left, right) for *_, left, right in ranked]
    unknown = next(
        (
            token
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind == TokenType.UNKNOWN
        ),
        None,
    )
    codec = tokenizers.Tokenizer(_bpe(metadata, ids, merges, unknown=unknown, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    if vocabulary.add_space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE_MARK))
    codec.normalizer = normalizers.Sequence(steps)
    return codec


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(vocabulary.tokens)}


def _bpe(
    metadata: GGUFMetadata,
    ids: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    unknown: str | None = None,
    byte_fallback: bool = False,
) -> models.BPE:
    try:
        return models.BPE(
            vocab=ids,
            merges=merges,
            ignore_merges=ignore_merges,
            unk_token=unknown,
            fuse_unk=byte_fallback,
            byte_fallback=byte_fallback,
        )
    except Exception as error:
        # The library raises bare Exceptions, e.g. for a merge whose parts are no tokens.
        why = " ".join(str(error).split())
        raise DamagedModel(f"{metadata.path}: the merges do not fit the tokens: {why}") from error
