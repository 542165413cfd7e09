"""The JSON that comes in: OpenAI's requests, as far as they can be honoured, and a few of vLLM's.

Types are JSON's: "1" is no number and true is not 1. What is not declared is refused. OpenAI's
fields that would change the answer in a way that is not supported are declared with the values that
ask for nothing (``Only``), so that clients that spell out defaults are served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from headway.core.priority import MAX_PRIORITY, MIN_PRIORITY
from headway.core.sampling_params import SamplingParams

__all__ = [
    "MAX_CACHE_SALT",
    "ChatCompletionRequest",
    "ChatMessage",
    "CompletionRequest",
    "GenerationRequest",
    "Only",
    "SetPriorityRequest",
    "StreamOptions",
]

#: Characters of a ``cache_salt``; the engine's limit.
MAX_CACHE_SALT: Final = 256

_MAX_INT32: Final = 2**31 - 1
_MAX_UINT64: Final = 2**64 - 1

_T = TypeVar("_T")


class Only:
    """Marks a field that is not supported: only values that ask for nothing are accepted."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, __: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": list(self._values), "description": "Not supported."}

    def _check(self, value: Any) -> Any:
        for accepted in self._values:
            if value == accepted and isinstance(value, bool) == isinstance(accepted, bool):
                return value
        names = " or ".join(map(json.dumps, self._values))
        raise PydanticCustomError(
            "not_supported", "not supported, must be {accepted}", {"accepted": names}
        )


def _text_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, list):
        kinds = {str: "texts", int: "tokens", list: "token_lists"}
        return kinds.get(type(value[0])) if value else "texts"
    return "text" if isinstance(value, str) else None


#: A list that is not looked through any further once something is wrong with it.
_List = Annotated[list[_T], Field(fail_fast=True)]
_TokenId = Annotated[int, Field(ge=0, le=_MAX_INT32)]
_Tokens = Annotated[_List[_TokenId], Field(min_length=1)]
_Text = Annotated[str, StringConstraints(min_length=1)]
_StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]

_Prompt = Annotated[
    Annotated[_Text, Tag("text")]
    | Annotated[_List[_Text], Field(min_length=1, max_length=2048), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[_List[_Tokens], Field(min_length=1, max_length=2048), Tag("token_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, a list of texts, token ids, or a list of such lists",
    ),
]
_Stop = Annotated[
    Annotated[_StopText, Tag("text")]
    | Annotated[_List[_StopText], Field(max_length=1024), Tag("list")],
    Discriminator(_text_or_list),
]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_BiasedToken = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
_LogitBias = Annotated[
    dict[_BiasedToken, _Bias],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Label = Annotated[str, StringConstraints(max_length=1024)]


def _check_cache_salt(salt: str) -> str:
    if len(salt) > MAX_CACHE_SALT:
        raise PydanticCustomError(
            "cache_salt_too_long",
            "has {length} characters, may have at most {limit}",
            {"length": len(salt), "limit": MAX_CACHE_SALT},
        )
    return salt


_CacheSalt = Annotated[
    str,
    AfterValidator(_check_cache_salt),
    Field(json_schema_extra={"maxLength": MAX_CACHE_SALT}),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream says beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every piece has the token counts so far."
    )
    include_obfuscation: Annotated[Any, Only(None, False)] = None


class GenerationRequest(_Body):
    """What both kinds of completion have in common."""

    model: str | None = Field(None, description="Default: the model that is served.")
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INT32)] | None = Field(
        None, description="0 or -1: all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="0: leaves no token out."
    )
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT32)] | None = Field(
        None, description="At most what may be generated; the output does not end before."
    )
    seed: Annotated[int, Field(ge=MIN_PRIORITY, le=_MAX_UINT64)] | None = None
    stop: _Stop | None = None
    stop_token_ids: Annotated[_List[_TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = Field(
        None, description="1 changes nothing; below 1 attracts."
    )
    logit_bias: _LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)] | None = Field(
        None, description="Smaller is more urgent. Headers and this one precede service_tier."
    )
    service_tier: _Label | None = None
    cache_salt: _CacheSalt | None = Field(
        None, description="Only requests with the same one share cached prefixes."
    )
    user: _Label | None = None

    response_format: Annotated[Any, Only(None, {"type": "text"})] = None

    @field_validator("stream_options")
    @classmethod
    def _needs_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and info.data.get("stream") is not True:
            raise PydanticCustomError("needs_stream", "only allowed when stream is true")
        return value

    @property
    def num_choices(self) -> int:
        """Choices of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """``stop``, in one form."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def has_continuous_usage(self) -> bool:
        """Whether every piece of a stream has the token counts so far; only with the last ones."""
        options = self.stream_options
        return (
            self.includes_usage and options is not None and (options.continuous_usage_stats is True)
        )

    def sampling_params(
        self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """How to generate one choice.

        Raises:
            InvalidRequest: a value is out of range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=_default(self.min_tokens, 0),
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=_default(self.top_k, 0),
            min_p=_default(self.min_p, 0.0),
            # Clients know seeds as int64; the engine counts from 0.
            seed=None if self.seed is None else self.seed & _MAX_UINT64,
            stop=self.stop_texts,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos is True,
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``."""

    prompt: _Prompt
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_INT32)] | None = Field(
        None, description="Default 16; 0 only with echo."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    best_of: Annotated[Any, Only(None, 1)] = None
    suffix: Annotated[Any, Only(None, "")] = None

    @field_validator("max_tokens")
    @classmethod
    def _none_needs_echo(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and info.data.get("echo") is not True:
            raise PydanticCustomError("needs_echo", "must be at least 1, or 0 with echo")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """``prompt``, in one form."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[_List[TextPart], Field(min_length=1, max_length=2048), Tag("list")],
        Discriminator(_text_or_list),
    ]
    name: _Label | None = None
    tool_call_id: _Label | None = None

    # What answers have, and histories therefore repeat.
    refusal: Annotated[Any, Only(None)] = None
    annotations: Annotated[Any, Only(None, [])] = None
    audio: Annotated[Any, Only(None)] = None
    function_call: Annotated[Any, Only(None)] = None
    tool_calls: Annotated[Any, Only(None, [])] = None

    def for_template(self) -> Mapping[str, Any]:
        """What chat templates are written for."""
        return self.model_dump(
            include={"role", "content", "name", "tool_call_id"}, exclude_none=True
        )


class ChatCompletionRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[_List[ChatMessage], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_INT32)] | None = Field(
        None, description="Precedes max_tokens. Default: what is left of the context."
    )
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    # These cannot change the answer.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: _Label | None = None
    safety_identifier: _Label | None = None

    audio: Annotated[Any, Only(None)] = None
    function_call: Annotated[Any, Only(None, "none")] = None
    functions: Annotated[Any, Only(None, [])] = None
    modalities: Annotated[Any, Only(None, ["text"])] = None
    moderation: Annotated[Any, Only(None)] = None
    prediction: Annotated[Any, Only(None)] = None
    prompt_cache_options: Annotated[Any, Only(None)] = None
    prompt_cache_retention: Annotated[Any, Only(None, "in_memory")] = None
    reasoning_effort: Annotated[Any, Only(None, "none")] = None
    store: Annotated[Any, Only(None, False)] = None
    tool_choice: Annotated[Any, Only(None, "none", "auto")] = None
    tools: Annotated[Any, Only(None, [])] = None
    verbosity: Annotated[Any, Only(None, "medium")] = None
    web_search_options: Annotated[Any, Only(None)] = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("logprobs") is not True:
            raise PydanticCustomError("needs_logprobs", "only allowed when logprobs is true")
        return value


class SetPriorityRequest(_Body):
    """The body of ``POST /v1/requests/{id}``."""

    priority: Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)]


def _default(value: _T | None, default: _T) -> _T:
    return default if value is None else value
