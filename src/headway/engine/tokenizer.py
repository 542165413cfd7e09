"""Text to token ids and back, by the rules and the vocabulary of one GGUF file.

Two properties that the engine relies on:

- **Decoding is concatenation of bytes.** Every token stands for fixed bytes
  (:meth:`Tokenizer.token_bytes`), and a decoded text is those bytes read as UTF-8, with U+FFFD for
  what is not UTF-8. So a text can be decoded token by token, and the pieces add up exactly.
- **A tokenizer is immutable**, so any number of threads may share one.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from typing import Final

from headway.core.errors import DamagedModel, InvalidRequest
from headway.engine.gguf_vocabulary import SPACE_MARK, TokenType, build_codec, read_vocabulary
from headway.models.gguf_metadata import GGUFMetadata, read_metadata

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

_SPECIAL_TYPES: Final = frozenset({int(TokenType.CONTROL), int(TokenType.UNKNOWN)})

#: Control tokens that end a turn. A file names one EOS token, but models that were tuned for chat
#: also end with one of these, and files that were converted early name the wrong one.
_END_OF_TURN: Final = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
    }
)


class Tokenizer:
    """The tokenizer of one model file.

    Building one reads the file's header and takes about 0.3 s for 49,152 tokens.

    Args:
        source: the path of a GGUF file, or its metadata when that was read already.

    Raises:
        DamagedModel: the file is damaged, or its tokenizer contradicts itself.
        UnsupportedModel: its tokenizer model or pre-tokenizer is not supported.
    """

    #: The id that begins a text, or ``None``.
    bos_token_id: int | None
    #: The id that ends a text, as the file names it, or ``None``.
    eos_token_id: int | None
    #: Every id that ends generation: the EOS token and the control tokens that end a turn.
    eos_token_ids: frozenset[int]
    #: Ids that are not part of the text: left out by ``decode(skip_special_tokens=True)``.
    special_token_ids: frozenset[int]
    #: The number of ids; valid ids are ``0 <= id < vocab_size``.
    vocab_size: int
    #: The source of the file's chat template, or ``None``.
    chat_template: str | None

    def __init__(self, source: GGUFMetadata | str | os.PathLike[str]) -> None:
        metadata = source if isinstance(source, GGUFMetadata) else read_metadata(source)
        vocabulary = read_vocabulary(metadata)
        self._parsing, self._literal = build_codec(metadata, vocabulary)
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        self._byte_level = vocabulary.byte_level
        self._strip_prefix = vocabulary.add_space_prefix
        self._bytes: dict[int, bytes] = {}

        self.vocab_size = len(self._tokens)
        self.bos_token_id = self._special_id(metadata, "bos")
        self.eos_token_id = self._special_id(metadata, "eos")
        self.special_token_ids = frozenset(
            token_id for token_id, kind in enumerate(self._types) if kind in _SPECIAL_TYPES
        )
        ends = {self._special_id(metadata, name) for name in ("eos", "eot", "eom")}
        ends |= {
            token_id
            for token_id in self.special_token_ids
            if self._tokens[token_id] in _END_OF_TURN
        }
        self.eos_token_ids = frozenset(token_id for token_id in ends if token_id is not None)
        self.chat_template = None
        if "tokenizer.chat_template" in metadata.values:
            self.chat_template = metadata.string("tokenizer.chat_template")

        add_eos = metadata.boolean("tokenizer.ggml.add_eos_token", False)
        self._prefix = self._affix(vocabulary.add_bos_token, self.bos_token_id)
        self._suffix = self._affix(add_eos, self.eos_token_id)

    @property
    def bos_token(self) -> str:
        """The text of the BOS token; empty if there is none."""
        return "" if self.bos_token_id is None else self._tokens[self.bos_token_id]

    @property
    def eos_token(self) -> str:
        """The text of the EOS token; empty if there is none."""
        return "" if self.eos_token_id is None else self._tokens[self.eos_token_id]

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = True
    ) -> list[int]:
        """Encode a text. Takes about 1 µs a character.

        Args:
            text: any text without lone surrogates.
            add_special_tokens: put the BOS and EOS tokens where the file says that they belong.
                A prompt rendered by a chat template spells them out already: pass ``False``.
            parse_special_tokens: read the spelling of a control token in the text (``<|im_end|>``)
                as that token, as Hugging Face and vLLM do. A rendered chat needs it. For text from
                somebody who must not end the turn or open another one, pass ``False``: the spelling
                is then encoded like any other characters.

        Raises:
            InvalidRequest: not a text, or one with a lone surrogate, which has no UTF-8 form.
        """
        codec = self._parsing if parse_special_tokens else self._literal
        if not isinstance(text, str):
            raise InvalidRequest(f"a text is wanted, not a value of type {type(text).__name__}")
        try:
            # Unlike ``encode``, it lets other threads run meanwhile.
            (encoding,) = codec.encode_batch_fast([text], add_special_tokens=False)
            ids: list[int] = encoding.ids
        except TypeError:
            # The library takes a string that it cannot convert to UTF-8 for no string at all.
            _refuse_surrogates(text)
            raise
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids; what is not UTF-8 becomes U+FFFD. O(length of the text).

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        data = b"".join(map(detokenizer.take_bytes, token_ids))
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a special token's are its spelling. O(1).

        Raises:
            InvalidRequest: the id is outside of the vocabulary.
        """
        found = self._bytes.get(token_id)
        if found is None:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside of the vocabulary (0 to {self.vocab_size - 1})"
                )
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    @property
    def strips_leading_space(self) -> bool:
        """Whether encoding puts a space before the text, which decoding takes away again."""
        return self._strip_prefix

    def _spell(self, token_id: int) -> bytes:
        token, kind = self._tokens[token_id], self._types[token_id]
        if kind in _SPECIAL_TYPES or kind == TokenType.USER_DEFINED:
            return token.encode()
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:
                return token.encode()
        if kind == TokenType.BYTE:
            try:
                return bytes([int(token.removeprefix("<0x").removesuffix(">"), 16)])
            except ValueError:
                return token.encode()
        return token.replace(SPACE_MARK, " ").encode()

    def _special_id(self, metadata: GGUFMetadata, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in metadata.values:
            return None
        token_id = metadata.integer(key)
        if not 0 <= token_id < self.vocab_size:
            raise DamagedModel(
                f"{metadata.path}: {key} is {token_id}, outside of {self.vocab_size} tokens"
            )
        return token_id

    @staticmethod
    def _affix(wanted: bool, token_id: int | None) -> tuple[int, ...]:
        return (token_id,) if wanted and token_id is not None else ()


class IncrementalDetokenizer:
    """Decodes a growing sequence of ids, and hands out each character once it is complete.

    The pieces returned by :meth:`append`, followed by :meth:`flush`, concatenate to exactly what
    :meth:`Tokenizer.decode` makes of all the ids, also where they are not UTF-8. Until
    :meth:`flush`, no piece contains a U+FFFD for a character whose bytes may still come. Each call
    is O(bytes of the token): nothing is decoded twice.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._strip = tokenizer.strips_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token_id: int) -> str:
        """Add a token and return the text that is complete now, which is often empty.

        Raises:
            InvalidRequest: the id is outside of the vocabulary.
        """
        return self._decoder.decode(self.take_bytes(token_id))

    def flush(self) -> str:
        """End the sequence and return what an unfinished character leaves: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)

    def take_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to the text at this point of it.

        They differ from :meth:`Tokenizer.token_bytes` for special tokens that are left out and for
        the space that a SentencePiece vocabulary puts before the first word.
        """
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._skipped:
            return b""
        if self._strip and data:
            self._strip = False
            return data.removeprefix(b" ")
        return data


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text has no UTF-8 form: character {error.start} is a lone surrogate"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for every byte (``bytes_to_unicode`` of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return alphabet


_BYTE_OF: Final = _byte_alphabet()
