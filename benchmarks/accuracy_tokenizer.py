"""Do Headway's tokenizer and chat template give the ids that other engines give?

200 texts, chosen to differ in everything that tokenizers differ in, are encoded by Headway and by
``transformers``, both reading the same GGUF file. ``transformers`` reads the vocabulary and the
merges of such a file but not ``tokenizer.ggml.pre``, and cuts every byte-level text as GPT-2 did.
For a model that was trained with another rule its ids are then wrong for some texts. So there are
two comparisons: with ``transformers`` as it converts the file, and with the rule that the file
declares put into it. An engine that implements the declared rule itself is llama.cpp: name a
running ``llama-server`` to compare with a third implementation that shares no code with Headway's.
"""

from __future__ import annotations

import inspect
import json
import random
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headway.engine.chat_template import ChatTemplate
from headway.engine.tokenizer import Tokenizer
from headway.models.gguf_metadata import read_metadata

__all__ = ["chats", "compare", "texts"]

NUM_TEXTS = 160
NUM_CHATS = 40

Encode = Callable[[str], list[int]]

_SNIPPETS = """\
Hello, world!
I can't, you'll, we've, they'd, it's, I'm, he're, DON'T, I'LL, don’t, 'tis, rock'n'roll, ''s
The year 1984, 3.14159, 1,000,000, 0x7f, 1e-9, 2²+½, Ⅷ, ٣٤٥, 一二三, ①②③, 12th, v2.0.1-rc1
a 1  2   3    4 5\t6\t\t7
   leading, trailing   , and   inner   spaces
line\\nbreaks\\r\\nof\\n\\nmany\\n\\n\\nkinds\\r\\r and\\n   indents
tabs\tand\t\ttabs \t mixed\t  \twith spaces
no-break\u00a0space, thin\u2009space, ideographic\u3000space, zero\u200bwidth, line\u2028separator
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
いろはにほへと ちりぬるを 色は匂へど 散りぬるを。カタカナも、漢字も。
天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。2026年11月22日
다람쥐 헌 쳇바퀴에 타고파. 키스의 고유조건은 입술끼리 만나야 하고
นายสังฆภัณฑ์ เฮงพิทักษ์ฝั่ง ผู้เฒ่าซึ่งมีอาชีพเป็นฅนขายฃวด
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر
דג סקרן שט בים מאוכזב ולפתע מצא חברה
e\u0301 é ñ n\u0303 Å A\u030a \u1e9b\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘
🎉 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 👍🏽 ❤️ ☺ 😀😀😀 a🎉b 1🎉2
𝓗𝓮𝓵𝓵𝓸 𐍈 𠜎 ﬁ ﬀ ㍿ ⁇ … — – ‘’ “” « » ¿ ¡ § ¶ † ‡ • ‰ € £ ¥ ₿
\u0000\u0001\u001f\u007f\u0080\u0085\u009f control characters \u001b[31mred\u001b[0m
!!! ??? ... ,,, ;;; --- === *** ### ~~~ ``` ((( ))) [[[ ]]] {{{ }}} <<< >>> |||
email@example.com https://example.com/a?b=c&d=%20#frag C:\\\\Users\\\\x /usr/bin/env ../../x
def f(x: int) -> int:\\n    return x ** 2 if x > 0 else -x  # comment\\n
for (int i = 0; i < 10; ++i) {\\n\\tprintf("%d\\\\n", a[i]);\\n}\\n
{"key": [1, 2.5, null, true], "nested": {"a": "b\\\\u00e9"}}
SELECT * FROM t WHERE a = 'it''s' AND b >= 10;\\n
<div class="x">&nbsp;<br/></div> <!-- comment --> <|not_a_token|> <im_start>
\\\\begin{equation} \\\\int_0^\\\\infty e^{-x^2} dx = \\\\frac{1}{2} \\\\end{equation}
| a | b |\\n|---|---|\\n| 1 | 2 |\\n
- [ ] item one\\n  - [x] item 2\\n    1. item three\\n
The the THE tHe antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n
<|endoftext|><repo_name>x<file_sep><jupyter_start> <|im_start|><|im_start|> <|IM_END|> <|im_end |>
"""

_DOCUMENTED: tuple[str, ...] = (
    "argparse",
    "asyncio",
    "bisect",
    "collections",
    "csv",
    "datetime",
    "decimal",
)
_DOCUMENTED += (
    "enum",
    "fractions",
    "heapq",
    "http.client",
    "json",
    "logging",
    "pickle",
    "random",
    "re",
)
_DOCUMENTED += ("sched", "smtplib", "socketserver", "statistics", "string", "tarfile", "textwrap")
_DOCUMENTED += ("threading", "turtle", "typing", "urllib.request", "uuid", "weakref", "zipfile")


def texts() -> list[str]:
    """160 texts: hand-picked ones, documentation and source of the standard library, and noise."""
    found = ["", " ", "  ", "\n", "\t", "\n\n\n", " \n ", "a", " a", "1", " 1", "  1", "é", "🎉"]
    found += [line.replace("\\n", "\n").replace("\\r", "\r") for line in _SNIPPETS.splitlines()]
    for name in _DOCUMENTED:
        module = __import__(name, fromlist=["_"])
        found.append((inspect.getdoc(module) or name)[:3_000])
        found.append(inspect.getsource(module)[2_000:5_000])
    noise = random.Random(20_260_101)
    alphabets = (
        " \n\t\r  ab1",
        "0123456789 .,",
        "'’`\"sStTrReEvVmMlLdD ",
        "".join(map(chr, range(0xA0, 0x250))),
        "".join(map(chr, [*range(0x3040, 0x30FF), *range(0x4E00, 0x4E80)])) + " 1。",
        "".join(map(chr, [*range(0x300, 0x330), *range(0x61, 0x6B)])),
        "".join(map(chr, [*range(0x1F300, 0x1F380), 0x200D, 0xFE0F, 0x20])),
    )
    while len(found) < NUM_TEXTS:
        alphabet = alphabets[len(found) % len(alphabets)]
        found.append("".join(noise.choices(alphabet, k=noise.randint(1, 200))))
    return found[:NUM_TEXTS]


def chats() -> list[list[dict[str, str]]]:
    """40 conversations of one to seven turns, with and without a system message."""
    words = texts()
    found = []
    for index in range(NUM_CHATS):
        conversation = []
        if index % 3 == 0:
            conversation.append({"role": "system", "content": words[(index * 5) % len(words)]})
        for turn in range(1 + 2 * (index % 4)):
            role = "assistant" if turn % 2 else "user"
            text = words[(index * 7 + turn * 11 + 14) % len(words)]
            conversation.append({"role": role, "content": text})
        found.append(conversation)
    return found


def compare(
    path: Path, llama_server: str | None = None, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Encode everything with everybody and count the agreements.

    Args:
        path: a GGUF file.
        llama_server: the address of a ``llama-server`` that runs the same file, if there is one.
        advance: called after each of the 200 texts (for a progress bar).
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 (an extra, and slow to import)

    metadata = read_metadata(path)
    ours = Tokenizer(metadata)
    template = ChatTemplate(ours.chat_template or "", ours.bos_token, ours.eos_token)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    declared = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pre = metadata.string("tokenizer.ggml.pre", "default")
    rule = _independent_rule(pre)
    if rule is not None:
        declared.backend_tokenizer.pre_tokenizer = rule

    others: dict[str, Encode] = {
        "transformers_with_declared_pre_tokenizer": lambda text: declared(text)["input_ids"],
        "transformers_as_converted": lambda text: theirs(text)["input_ids"],
    }
    if llama_server:
        others["llama_cpp"] = lambda text: _llama_cpp(llama_server, text)
    agreed = dict.fromkeys(others, 0)
    differing: dict[str, list[dict[str, Any]]] = {name: [] for name in others}
    prompts_agreed = 0
    for text, messages in _everything():
        if messages is None:
            mine = ours.encode(text)
        else:
            text = template.render(messages)  # noqa: PLW2901 (a chat's text is its prompt)
            mine = ours.encode(text, add_special_tokens=False)
            rendered = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            prompts_agreed += rendered == text
        for name, encode in others.items():
            other = encode(text)
            if other == mine:
                agreed[name] += 1
            else:
                differing[name].append(_first_difference(ours, text, mine, other))
        advance()
    return {
        "texts": NUM_TEXTS + NUM_CHATS,
        "chat_prompts": NUM_CHATS,
        "chat_prompts_equal": prompts_agreed,
        "pre_tokenizer": pre,
        "equal": agreed,
        "first_differences": {name: found[:3] for name, found in differing.items() if found},
    }


def _everything() -> Iterator[tuple[str, Sequence[dict[str, str]] | None]]:
    for text in texts():
        yield text, None
    for messages in chats():
        yield "", messages


def _independent_rule(pre: str) -> Any | None:
    """The pre-tokenizer of the models' own ``tokenizer.json`` where it is not GPT-2's.

    Stated here a second time, not imported: a comparison with itself would prove nothing.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence  # noqa: PLC0415

    if pre == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return None


def _llama_cpp(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        address.rstrip("/") + "/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        ids: list[int] = json.load(response)["tokens"]
    return ids


def _first_difference(
    tokenizer: Tokenizer, text: str, mine: list[int], other: list[int]
) -> dict[str, Any]:
    pairs = enumerate(zip(mine, other, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(mine), len(other)))
    window = slice(max(0, at - 1), at + 3)
    return {
        "text": text[:60],
        "at_token": at,
        "headway": [tokenizer.token_bytes(n).decode(errors="replace") for n in mine[window]],
        "other": [tokenizer.token_bytes(n).decode(errors="replace") for n in other[window]],
    }
