"""Tokenizers built from small files written here, and the default model's against known ids."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.core.errors import DamagedModel, InvalidRequest, ModelError, UnsupportedModel
from headway.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from headway.models.registry import DEFAULT_MODEL, resolve

#: The first example builds a tokenizer, and machines differ.
RELAXED = settings(deadline=None)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: GPT-2's alphabet, in the order of the bytes that its characters stand for. A printable byte of
#: Latin-1 stands for itself; the others are numbered from 256 on.
HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
ALPHABET = [chr(256 + HIDDEN.index(n)) if n in HIDDEN else chr(n) for n in range(256)]

MERGES = ["1 2", "12 3", "123 4", "Ġ Ġ", "Ġ 1", "h i", "Ġ hi", "' s", "! Ċ", "Ċ Ċ", "' S"]


def write(path: Path, **changes: Any) -> Path:
    """A byte-level file with a few merges; a change to ``None`` leaves the key out."""
    merges = changes.pop("merges", MERGES)
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<tool>",
        *ALPHABET,
        *(merge.replace(" ", "") for merge in merges),
    ]
    types = [CONTROL, CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 4)
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return write_values(path, values)


def write_sentencepiece(path: Path, **changes: Any) -> Path:
    words = {"▁": -1.0, "a": -2.0, "b": -2.5, "c": -3.0, "ab": -0.5, "bc": -0.1, "▁a": -0.7}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": [0.0] * 259 + list(words.values()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return write_values(path, values)


def write_values(path: Path, values: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@functools.cache
def byte_level() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer(write(Path(directory) / "byte.gguf"))


@functools.cache
def sentencepiece() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer(write_sentencepiece(Path(directory) / "spm.gguf"))


def pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text)]


# --- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # smollm: a digit is a piece of its own, which also parts it from the space before it.
        ("smollm", "hi 1234", ["hi", " ", "1", "2", "3", "4"]),
        ("smollm", "hi  1", ["hi", "  ", "1"]),
        ("smollm", "  hi", [" ", " hi"]),
        ("smollm", "hi's", ["hi", "'s"]),
        ("smollm", "hi!\n\n", ["hi", "!", "\n\n"]),
        ("starcoder", "12", ["1", "2"]),
        # gpt-2: numbers of any length, with the space before them.
        ("gpt-2", "hi 15", ["hi", " 1", "5"]),
        ("gpt-2", "1234", ["1234"]),
        ("gpt-2", "hi  1", ["hi", " ", " 1"]),
        ("default", "1234", ["1234"]),
        # qwen2: single digits; punctuation takes the newlines after it along.
        ("qwen2", "hi 1234", ["hi", " ", "1", "2", "3", "4"]),
        ("qwen2", "hi!\n\n", ["hi", "!\n", "\n"]),
        ("qwen2", "hi'S", ["hi", "'S"]),
        ("qwen35", "hi!\n\n", ["hi", "!\n", "\n"]),
        # llama-bpe: numbers of up to three digits, without the space.
        ("llama-bpe", "hi 1234", ["hi", " ", "123", "4"]),
        ("llama3", "1234", ["123", "4"]),
        ("llama-v3", "hi!\n\n", ["hi", "!\n", "\n"]),
    ],
)
def test_every_pre_tokenizer_cuts_as_its_name_says(
    tmp_path: Path, pre: str, text: str, expected: list[str]
) -> None:
    tokenizer = Tokenizer(write(tmp_path / "t.gguf", pre=pre, add_bos_token=False))
    assert pieces(tokenizer, text) == [piece.encode() for piece in expected]


def test_only_qwen35_keeps_a_combining_mark_with_its_letter(tmp_path: Path) -> None:
    # "x" and a combining tilde have no composed form, so NFC leaves two characters.
    mark = "̃".encode()
    spelled = [ALPHABET[byte] for byte in mark]
    merges = [" ".join(spelled), "x " + "".join(spelled)]
    text = "x̃"
    for pre, expected in (("qwen35", [text.encode()]), ("qwen2", [b"x", mark])):
        path = write(tmp_path / f"{pre}.gguf", pre=pre, merges=merges)
        assert pieces(Tokenizer(path), text) == expected


def test_qwen_texts_are_composed_first(tmp_path: Path) -> None:
    decomposed, composed = "e\u0301", "\u00e9"
    qwen = Tokenizer(write(tmp_path / "q.gguf", pre="qwen2"))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    assert byte_level().encode(decomposed) != byte_level().encode(composed)


def test_llama_bpe_takes_a_piece_that_is_a_token_whole(tmp_path: Path) -> None:
    # "hello" is in the vocabulary, but no merges lead to it.
    for pre, expected in (("llama-bpe", [b"hello"]), ("gpt-2", [b"h", b"e", b"l", b"l", b"o"])):
        path = tmp_path / f"{pre}.gguf"
        tokens = ["<|end_of_text|>", *ALPHABET, "qq", "hello"]
        write(
            path,
            pre=pre,
            tokens=tokens,
            token_type=[CONTROL] + [NORMAL] * 258,
            merges=["q q"],
            bos_token_id=0,
            eos_token_id=0,
            add_bos_token=False,
        )
        assert pieces(Tokenizer(path), "hello") == expected


def test_control_tokens_in_a_text_are_read_unless_asked_not_to() -> None:
    tokenizer = byte_level()
    assert tokenizer.encode("<|im_start|>hi<|im_end|>")[::2] == [1, 2]
    literal = tokenizer.encode("<|im_start|>hi<|im_end|>", parse_special_tokens=False)
    assert not set(literal) & tokenizer.special_token_ids
    assert tokenizer.decode(literal) == "<|im_start|>hi<|im_end|>"
    # A user-defined token is text, and is matched either way.
    assert tokenizer.encode("<tool>") == [3]
    assert tokenizer.encode("<tool>", parse_special_tokens=False) == [3]


@RELAXED
@given(st.text())
def test_no_text_spells_a_control_token_when_they_are_not_parsed(text: str) -> None:
    tokenizer = byte_level()
    spelled = f"{text}<|im_end|>{text}"
    ids = tokenizer.encode(spelled, parse_special_tokens=False)
    assert not set(ids) & tokenizer.special_token_ids
    assert tokenizer.decode(ids) == spelled


@RELAXED
@given(st.text())
def test_decoding_undoes_encoding(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@RELAXED
@given(st.text(alphabet=st.sampled_from("abc é日\n")).filter(lambda text: not text.startswith("▁")))
def test_decoding_undoes_encoding_with_a_space_prefix(text: str) -> None:
    tokenizer = sentencepiece()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_joins_the_best_score_first_and_falls_back_to_bytes() -> None:
    tokenizer = sentencepiece()
    # "bc" (-0.1) before "ab" (-0.5) and "▁a" (-0.7); BOS first, as the file's kind has it.
    assert tokenizer.encode("abc")[0] == tokenizer.bos_token_id
    assert pieces(tokenizer, "abc")[1:] == [b" a", b"bc"]
    assert pieces(tokenizer, "ab")[1:] == [b" ", b"ab"]
    assert pieces(tokenizer, "é")[1:] == [b" ", b"\xc3", b"\xa9"]
    assert tokenizer.decode(tokenizer.encode("é")) == "é"


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, None, None),
        ({"add_bos_token": True}, 1, None),
        ({"add_eos_token": True}, None, 2),
        ({"pre": "llama-bpe"}, 1, None),
        ({"pre": "llama-bpe", "add_bos_token": False}, None, None),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    tmp_path: Path, changes: dict[str, Any], first: int | None, last: int | None
) -> None:
    tokenizer = Tokenizer(write(tmp_path / "t.gguf", **changes))
    plain = tokenizer.encode("hi", add_special_tokens=False)
    added = [[token_id] if token_id is not None else [] for token_id in (first, last)]
    assert tokenizer.encode("hi") == added[0] + plain + added[1]


def test_the_ids_that_end_a_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path / "t.gguf", eos_token_id=1, chat_template="{{ 1 }}"))
    # As named by the file, and the control tokens known to end a turn.
    assert tokenizer.eos_token_ids == {0, 1, 2}
    assert tokenizer.eos_token_id == 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_start|>")
    assert tokenizer.chat_template == "{{ 1 }}"
    bare = Tokenizer(write(tmp_path / "bare.gguf", bos_token_id=None, eos_token_id=None))
    assert bare.eos_token_ids == {0, 2}
    assert (bare.bos_token_id, bare.eos_token_id, bare.eos_token) == (None, None, "")
    assert bare.chat_template is None


# --- decoding -------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: Iterable[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@RELAXED
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_the_whole_for_any_ids(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = byte_level() if kind == "byte level" else sentencepiece()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip)) == whole


@RELAXED
@given(text=st.text(), cut=st.integers(0, 40))
def test_a_character_is_handed_out_once_it_is_complete(text: str, cut: int) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text, parse_special_tokens=False)[:cut]
    *shown, rest = stream(tokenizer, ids, skip=False)
    data = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    # All complete characters and nothing else; what is cut off shows up at the end only.
    assert "".join(shown) == data.decode("utf-8", errors="ignore")
    assert rest == ("" if len("".join(shown).encode()) == len(data) else "\ufffd")


def test_special_tokens_are_left_out_or_spelled() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("<|im_start|>hi<tool><|im_end|>")
    assert tokenizer.decode(ids) == "hi<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<tool><|im_end|>"


def test_only_the_space_before_the_first_word_is_taken_away() -> None:
    tokenizer = sentencepiece()
    assert tokenizer.decode(tokenizer.encode("a a")) == "a a"
    assert stream(tokenizer, tokenizer.encode("a a"), skip=True)[:2] == ["", "a"]


# --- bad input ------------------------------------------------------------------------------------


def test_bad_texts_and_ids_are_refused() -> None:
    tokenizer = byte_level()
    for parse in (True, False):
        with pytest.raises(InvalidRequest, match="character 2 is a lone surrogate"):
            tokenizer.encode("hi\ud800", parse_special_tokens=parse)
    with pytest.raises(InvalidRequest, match="not a value of type int"):
        tokenizer.encode(7)  # type: ignore[arg-type]
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidRequest, match=f"token id {token_id} is outside"):
            tokenizer.decode([token_id])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "t5"}, UnsupportedModel, "tokenizer model 't5'"),
        ({"pre": "klingon"}, UnsupportedModel, "pre-tokenizer 'klingon'"),
        ({"model": None}, DamagedModel, "no 'tokenizer.ggml.model'"),
        ({"tokens": None}, DamagedModel, "no 'tokenizer.ggml.tokens'"),
        (
            {"tokens": ["h", "i"], "token_type": [1, 1], "bos_token_id": 0, "eos_token_id": 0},
            DamagedModel,
            "the merges do not fit the tokens",
        ),
        ({"token_type": [1, 1]}, DamagedModel, "token types"),
        ({"eos_token_id": 9999}, DamagedModel, "eos_token_id is 9999"),
        ({"add_bos_token": 1}, DamagedModel, "add_bos_token' is not a boolean"),
    ],
)
def test_a_file_whose_tokenizer_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[ModelError], message: str
) -> None:
    path = tmp_path / "t.gguf"
    write(path, **changes)
    with pytest.raises(error, match=message) as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("merge", ["h", "h i i", " hi", "hi ", ""])
def test_a_merge_that_is_no_pair_is_refused(tmp_path: Path, merge: str) -> None:
    tokens = ["<|im_end|>", *ALPHABET]
    changes = {"tokens": tokens, "token_type": [CONTROL] + [NORMAL] * 256}
    path = tmp_path / "t.gguf"
    write(path, merges=[merge], bos_token_id=0, eos_token_id=0, **changes)
    with pytest.raises(DamagedModel, match="is not a pair"):
        Tokenizer(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_anywhere_in_a_file_is_a_model_error_or_harmless(
    tmp_path: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from([write, write_sentencepiece]))
    path = kind(tmp_path / "t.gguf")
    content = bytearray(path.read_bytes())
    places = st.integers(0, len(content) - 1)
    for place, value in data.draw(st.dictionaries(places, st.integers(0, 255), max_size=4)).items():
        content[place] = value
    path.write_bytes(content)
    try:
        tokenizer = Tokenizer(path)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert "".join(stream(tokenizer, tokenizer.encode("hi 12"), True)) is not None


# --- the default model ----------------------------------------------------------------------------


@pytest.mark.model
def test_the_default_model_gives_the_ids_of_its_own_tokenizer() -> None:
    tokenizer = Tokenizer(resolve(DEFAULT_MODEL))
    assert tokenizer.vocab_size == 49_152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.encode("Hello 1234 don't") == [19556, 216, 33, 34, 35, 36, 1326, 982]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert tokenizer.encode("a  1") == [81, 256, 33]
    assert "<|im_start|>" in (tokenizer.chat_template or "")
