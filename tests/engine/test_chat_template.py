"""Chat templates: the environment they are written for, and messages they are not."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from headway.core.errors import InvalidRequest, UnsupportedModel
from headway.engine.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def render(source: str, *messages: Mapping[str, Any], **variables: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages or (USER,), **variables)


def test_chatml() -> None:
    template = ChatTemplate(CHATML)
    assert template.render([USER]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "S"}
    assert template.render([system, USER], add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_blocks_are_trimmed_as_in_transformers() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "hi\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ ['é<', {'b': 1, 'a': none}] | tojson }}", '["é<", {"b": 1, "a": null}]'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ tools | length }}", "2"),
        ("{{ undefined_name }}", ""),
        ("{{ messages[0].get('name', 'nobody') }}", "nobody"),
    ],
)
def test_what_templates_may_use(source: str, expected: str) -> None:
    assert render(source, tools=["a", "b"]) == expected


def test_strftime_now_is_the_local_date() -> None:
    before = datetime.now().astimezone()
    year = int(render("{{ strftime_now('%Y') }}"))
    assert before.year <= year <= datetime.now().astimezone().year


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("plain", "plain"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        (["one", {"type": "text", "text": "two"}], "one\ntwo"),
        ([], ""),
        ("", ""),
    ],
)
def test_content_is_text_or_text_parts(content: object, expected: str) -> None:
    message = {"role": "user", "content": content}
    assert render("{{ messages[0].content }}", message) == expected


def test_an_assistant_that_only_calls_tools_needs_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    source = "{{ messages[0].content }}{{ messages[0].tool_calls | length }}"
    assert render(source, message) == "1"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", "messages must be a list, not str"),
        ({"role": "user"}, "messages must be a list, not dict"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be a mapping, not str"),
        ([USER, {"content": "x"}], r"messages\[1\] has the role None"),
        ([{"role": 7, "content": "x"}], r"messages\[0\] has the role 7"),
        ([{"role": "user"}], r"messages\[0\] has content of type NoneType"),
        ([{"role": "user", "content": 5}], "content of type int"),
        ([{"role": "user", "content": b"x"}], "content of type bytes"),
        ([{"role": "user", "content": [7]}], r"content\[0\] must be a mapping, not int"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\] is of type 'image_url', only 'text' is supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] has no text"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(messages: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        ChatTemplate(CHATML).render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must"),
        ("{{ messages[0].content.nothing.more }}", "refuses the messages"),
        ("{{ 1 // 0 }}", "fails on the messages: ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "fails on the messages: TypeError"),
        ("{{ range(10 ** 9) | list }}", "fails on the messages: OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recurses too deeply"),
    ],
)
def test_a_template_that_fails_is_an_invalid_request(source: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'changed'}) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
    ],
)
def test_a_template_can_neither_change_the_messages_nor_leave_the_sandbox(source: str) -> None:
    message = dict(USER)
    with pytest.raises(InvalidRequest, match="refuses the messages"):
        render(source, message)
    assert message == USER


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}", "{% generation %}"])
def test_a_template_that_cannot_be_compiled_is_not_supported(source: str) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be compiled: line 1") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


def test_messages_are_not_changed_by_rendering() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ChatTemplate(CHATML).render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
