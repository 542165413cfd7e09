"""The JSON that goes out, as types: they document, and cost nothing when an answer is built.

Field for field OpenAI's. A request that was cancelled ends with the finish reason ``abort``, as in
vLLM.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

__all__ = [
    "AssistantMessage",
    "ChatChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Deleted",
    "ErrorBody",
    "ErrorDetail",
    "Model",
    "ModelList",
    "NewPriority",
    "PromptTokensDetails",
    "RequestList",
    "RequestState",
    "Status",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "Version",
]


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    """Of the prompts' tokens, those that the prefix cache had."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    r"""Parallel lists, with an entry for each token, the one that ended the text included.

    A token that is not UTF-8 by itself is spelled ``bytes:\xe2\x80``. Offsets are in characters
    of the choice's text. ``top_logprobs`` always has the token itself.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(TypedDict):
    """The answer to ``POST /v1/completions``; in a stream, a piece of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    service_tier: NotRequired[str]
    system_fingerprint: None


class TopLogprob(TypedDict):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TypedDict):
    r"""A token that was chosen; one that is not UTF-8 by itself is spelled ``\xe2\x80``."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """An entry for each token, the one that ended the answer included."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(TypedDict):
    """The answer to ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: NotRequired[str]
    system_fingerprint: None


class Model(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """The models that are served."""

    object: Literal["list"]
    data: list[Model]


class Status(TypedDict):
    """Whether requests are served."""

    status: Literal["ok"]


class Version(TypedDict):
    """Which Headway it is."""

    version: str


class RequestState(TypedDict):
    """Where an unfinished request stands.

    Ranks count from 0, which goes first; ``predicted_wait`` is in seconds, until the request is in
    a step (again). ``output_tokens`` are those of all ``choices``, and ``max_tokens`` is the limit
    of each. A request of several prompts, or of very many choices, is served in ``parts``: its
    status, priority, rank and times are those of the most urgent part that is unfinished, and its
    counts are the sums over the unfinished parts.
    """

    id: str
    object: Literal["request"]
    status: str
    priority: int
    rank: int
    age: float
    predicted_wait: float
    choices: int
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    max_tokens: int
    preemptions: int
    parts: NotRequired[list[RequestState]]


class RequestList(TypedDict):
    """Unfinished requests, most urgent first."""

    object: Literal["list"]
    data: list[RequestState]


class NewPriority(TypedDict):
    """A request that was given another priority."""

    id: str
    object: Literal["request"]
    priority: int


class Deleted(TypedDict):
    """A request that was told to end."""

    id: str
    object: Literal["request"]
    deleted: Literal[True]
