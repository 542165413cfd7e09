"""Chat messages to prompt text, by the template that the model file carries.

A template is a program from a file off the internet, so it runs in Jinja's
immutable sandbox: it sees the messages and a few functions, and can change nothing. The
environment is the one that templates are written for, that of ``transformers``
(``utils/chat_template_utils.py``): trimmed blocks, loop controls, ``raise_exception``,
``strftime_now``, a ``tojson`` that leaves characters as they are, and ``{% generation %}`` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headway.core.errors import InvalidRequest, UnsupportedModel

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A compiled chat template. Rendering changes nothing, so threads may share one.

    Args:
        source: the template, as ``tokenizer.chat_template`` of a GGUF file holds it.
        bos_token: the spelling of the BOS token, for templates that put it down themselves.
        eos_token: likewise of the EOS token.

    Raises:
        UnsupportedModel: the template cannot be compiled.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UnsupportedModel(
                f"the chat template cannot be compiled: line {error.lineno}: {error.message}"
            ) from error
        except RecursionError:
            raise UnsupportedModel("the chat template is nested too deeply") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: one or more mappings with a ``role`` (text) and a ``content``: text, or a
                sequence of ``{"type": "text", "text": …}`` parts, which are joined by newlines as
                in vLLM. An assistant's content may be ``None`` beside ``tool_calls``. Other keys
                are passed on to the template.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further variables for the template, such as ``tools``.

        Encode the result with ``add_special_tokens=False``: the template has put them down.

        Raises:
            InvalidRequest: the messages are malformed, or the template refuses them (many demand
                that roles alternate), or it cannot cope with them.
        """
        conversation = _check(messages)
        try:
            return self._template.render(
                {
                    **self._names,
                    **variables,
                    "messages": conversation,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A template is a program: it fails like one on messages it was not written for.
            raise InvalidRequest(
                f"the chat template fails on the messages: {type(error).__name__}: {error}"
            ) from error
        except RecursionError:
            raise InvalidRequest("the chat template recurses too deeply on the messages") from None


def _check(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidRequest(f"messages must be a list, not {type(messages).__name__}")
    if not messages:
        raise InvalidRequest("messages is empty, must hold at least one message")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def _check_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"messages[{index}] must be a mapping, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"messages[{index}] has the role {role!r}, must be a text")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        parts = (_check_part(f"messages[{index}].content[{n}]", p) for n, p in enumerate(content))
        return {**message, "content": "\n".join(parts)}
    if not isinstance(content, str):
        raise InvalidRequest(
            f"messages[{index}] has content of type {type(content).__name__}, "
            "must be a text or a list of text parts"
        )
    return dict(message)


def _check_part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{where} must be a mapping, not {type(part).__name__}")
    if part.get("type") != "text":
        raise InvalidRequest(f"{where} is of type {part.get('type')!r}, only 'text' is supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} has no text")
    return text


class _GenerationBlock(Extension):
    """``{% generation %}…{% endgeneration %}``, which marks the assistant's words for training.

    Here it is transparent.
    """

    tags = {"generation"}  # noqa: RUF012 (the base class declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
