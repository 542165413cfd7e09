"""From a checked body to an answer, without HTTP: what routes and other front ends share.

A front end reads a body (``headway.server.protocol.requests``), names the tenant, and gets an
``Answer``, which generates while it is read.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from headway.core.errors import UnknownRequest
from headway.core.sampling_params import SamplingParams
from headway.engine.client import EngineClient
from headway.engine.request_board import engine_id
from headway.engine.request_info import RequestInfo
from headway.server.active import ActiveRequest, ActiveRequests
from headway.server.config import ServerConfig
from headway.server.edge.priorities import priority_of
from headway.server.edge.tenants import Tenant
from headway.server.generation import Generation, choice_groups
from headway.server.protocol.answer_format import AnswerFormat, Outputs
from headway.server.protocol.chat_answer import ChatAnswer
from headway.server.protocol.completion_answer import CompletionAnswer
from headway.server.protocol.errors import ApiError
from headway.server.protocol.prompts import PromptEncoder
from headway.server.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from headway.server.protocol.response_types import RequestState
from headway.server.telemetry.tracing import Tracer

__all__ = ["Answer", "Call", "Serving"]

#: An id stands in paths and headers.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")

#: Of a completion that says nothing else; OpenAI's default.
_MAX_TOKENS: Final = 16


class Call(NamedTuple):
    """What a request says beside its body.

    Attributes:
        tenant: the owner of the request.
        request_id: None = an id is drawn.
        priority: precedes the body's; None = the body's counts.
        trace: W3C's trace headers, among others; see ``headway.server.telemetry.tracing``.
    """

    tenant: Tenant
    request_id: str | None = None
    priority: int | None = None
    trace: Mapping[str, str] = MappingProxyType({})


class Serving:
    """Answers requests of tenants with one engine; belongs to the engine's event loop.

    Args:
        engine: started, or about to be.
        config: the limits of a request, and what priorities mean.
        tracer: told where a request's trace begins; None = requests are not traced.
    """

    def __init__(
        self, engine: EngineClient, config: ServerConfig, tracer: Tracer | None = None
    ) -> None:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        self.engine = engine
        self.config = config
        self.tracer = tracer
        self.prompts = PromptEncoder(tokenizer, engine.description.max_request_tokens)
        self._active = ActiveRequests()

    # ------------------------------------------------------------------ answers

    async def complete(self, call: Call, body: CompletionRequest) -> Answer:
        """The answer to a completion request.

        Raises:
            ApiError: the model is unknown, a number exceeds the server's limits, the id cannot
                stand in a path, or the tenant may not ask for it.
            HeadwayError: the prompts are too long, or a parameter is out of range.
        """
        request_id, priority = self._accept(call, body, "cmpl", len(body.prompts))
        token_ids = await self._tokens(body.prompts)
        max_tokens = self.prompts.output_limit(token_ids, body.max_tokens, _MAX_TOKENS)
        params = body.sampling_params(
            max(1, max_tokens),  # the engine cannot do nothing; the token is dropped
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        words = CompletionAnswer(
            request_id, self._model_name(body), body, token_ids, self.prompts.tokenizer
        )
        return self._answer(call, request_id, priority, body, token_ids, params, words)

    async def chat(self, call: Call, body: ChatCompletionRequest) -> Answer:
        """The answer to a chat request.

        Raises:
            ApiError, HeadwayError: as ``complete``, or the model cannot chat.
        """
        request_id, priority = self._accept(call, body, "chatcmpl", 1)
        messages = [message.for_template() for message in body.messages]
        prompt = await self.prompts.encode_chat(messages)
        max_tokens = self.prompts.output_limit(
            [prompt], body.max_completion_tokens or body.max_tokens
        )
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling_params(max_tokens, logprobs=logprobs)
        words = ChatAnswer(
            request_id, self._model_name(body), body, [prompt], self.prompts.tokenizer
        )
        return self._answer(call, request_id, priority, body, [prompt], params, words)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served.

        Raises:
            ApiError: 404.
        """
        if name not in self.config.served_model_names:
            served = ", ".join(self.config.served_model_names)
            raise ApiError(
                404,
                f"model is {name!r}, served are: {served}",
                param="model",
                code="model_not_found",
            )

    # ------------------------------------------------------------------ unfinished requests

    def list_requests(self, tenant: Tenant) -> list[RequestState]:
        """A tenant's unfinished requests, most urgent first."""
        parts: dict[str, list[RequestInfo]] = {}
        for info in self.engine.list_requests(tenant=tenant.name):
            owner = self._active.find(info.request_id, tenant.name)
            if owner is not None:
                parts.setdefault(owner.request_id, []).append(info)
        return [_state(request_id, infos) for request_id, infos in parts.items()]

    def get_request(self, tenant: Tenant, request_id: str) -> RequestState:
        """Where a tenant's request stands.

        Raises:
            UnknownRequest: it has none of this id.
        """
        part_ids = self._find(tenant, request_id)
        if len(part_ids) == 1:
            found = self.engine.get_request(part_ids[0], tenant.name)
            infos = [] if found is None else [found]
        else:
            infos = [
                info
                for info in self.engine.list_requests(tenant=tenant.name)
                if info.request_id in part_ids
            ]
        if not infos:
            raise _unknown(request_id)
        return _state(request_id, infos)

    async def set_priority(self, tenant: Tenant, request_id: str, priority: int) -> None:
        """Make a tenant's request more or less urgent.

        Raises:
            UnknownRequest: it has none of this id.
            ApiError: 403, it may not ask for the priority.
        """
        part_ids = self._find(tenant, request_id)
        tenant.check_priority(priority)
        for part_id in part_ids:
            await self.engine.set_priority(part_id, priority, tenant.name)

    async def cancel(self, tenant: Tenant, request_id: str) -> None:
        """End a tenant's request; what it has got so far is its answer.

        Raises:
            UnknownRequest: it has none of this id.
        """
        for part_id in self._find(tenant, request_id):
            await self.engine.abort(part_id, tenant.name)

    # ------------------------------------------------------------------ internals

    def _accept(
        self, call: Call, body: GenerationRequest, prefix: str, num_prompts: int
    ) -> tuple[str, int]:
        """The id and the priority of a request.

        Everything is checked that can be without looking at the prompts.
        """
        config = self.config
        if body.model is not None:
            self.check_model(body.model)
        num_stop, num_sequences = len(body.stop_texts), num_prompts * body.num_choices
        if num_stop > config.max_stop:
            raise ApiError(
                400, f"stop has {num_stop} texts, may have at most {config.max_stop}", param="stop"
            )
        if num_sequences > config.max_num_choices:
            raise ApiError(
                400,
                f"{num_prompts} prompts with n={body.num_choices} make {num_sequences} choices, "
                f"at most {config.max_num_choices} are allowed",
                param="prompt" if body.num_choices == 1 else "n",
            )
        request_id = call.request_id
        if request_id is None:
            request_id = f"{prefix}-{uuid.uuid4().hex}"
        elif not _REQUEST_ID.fullmatch(request_id):
            raise ApiError(
                400,
                f"X-Request-Id is {request_id!r}, must be 1 … 128 letters, digits and . _ : -",
                param="X-Request-Id",
            )
        call.tenant.check_room(num_sequences)
        return request_id, priority_of(call.priority, body, call.tenant, config)

    async def _tokens(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        """The tokens of prompts, which are texts all or tokens all."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokens = [prompt for prompt in prompts if isinstance(prompt, list)]
        return await self.prompts.encode(texts) if texts else tokens

    def _answer(
        self,
        call: Call,
        request_id: str,
        priority: int,
        body: GenerationRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        words: AnswerFormat,
    ) -> Answer:
        tenant = call.tenant
        groups = [*choice_groups(prompts, params, body.num_choices, self.engine.description)]
        request = ActiveRequest.of(request_id, tenant.name, len(groups))
        generation = Generation(request, groups, tenant, priority, body.cache_salt or "")
        if self.tracer is not None:
            for part_id in request.part_ids:
                self.tracer.begin(engine_id(part_id, tenant.name), call.trace)
        return Answer(self.engine, self._active, generation, words)

    def _model_name(self, body: GenerationRequest) -> str:
        return body.model or self.config.model_name

    def _find(self, tenant: Tenant, request_id: str) -> tuple[str, ...]:
        """The ids of the parts that an id of the tenant's means."""
        found = self._active.find(request_id, tenant.name)
        if found is None:
            raise _unknown(request_id)
        return found.named(request_id)


class Answer:
    """An answer that is generated while it is read; read it in one way, and once.

    Leaving off reading, by closing the iterator or by cancelling its task, aborts what is
    unfinished.

    Args:
        engine: generates.
        active: where the request is entered while it is served.
        generation: what to generate.
        words: how to say it.
    """

    def __init__(
        self,
        engine: EngineClient,
        active: ActiveRequests,
        generation: Generation,
        words: AnswerFormat,
    ) -> None:
        self._engine = engine
        self._active = active
        self._generation = generation
        self._words = words

    @property
    def request_id(self) -> str:
        """As given or drawn."""
        return self._generation.request.request_id

    async def whole(self) -> dict[str, Any]:
        """The answer as JSON, once it is complete.

        Raises:
            HeadwayError: it could not be completed.
            ApiError: 429, the tenant has as many sequences as it may.
        """
        async with aclosing(self._steps()) as steps:
            async for outputs in steps:
                self._words.add(outputs)
        return self._words.body()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, as it is made; empty where a step adds no text.

        Raises:
            HeadwayError, ApiError: as ``whole``.
        """
        async with aclosing(self._steps()) as steps:
            async for outputs in steps:
                yield self._words.events(outputs)
        yield self._words.last_events()

    async def _steps(self) -> AsyncGenerator[Outputs, None]:
        generation = self._generation
        with (
            generation.tenant.slots(generation.num_choices),
            self._active.register(generation.request),
        ):
            async with aclosing(generation.run(self._engine)) as steps:
                async for outputs in steps:
                    yield outputs


def _unknown(request_id: str) -> UnknownRequest:
    return UnknownRequest(f"no unfinished request has the id {request_id!r}")


def _state(request_id: str, infos: Sequence[RequestInfo]) -> RequestState:
    """The state of a request of these parts, most urgent first; if several, of each, too."""
    first = infos[0]
    state: RequestState = {
        "id": request_id,
        "object": "request",
        "status": first.status,
        "priority": first.priority,
        "rank": first.rank,
        "age": first.age,
        "predicted_wait": first.predicted_wait,
        "choices": sum(info.num_sequences for info in infos),
        "prompt_tokens": sum(info.num_prompt_tokens for info in infos),
        "computed_tokens": sum(info.num_computed_tokens for info in infos),
        "output_tokens": sum(info.num_output_tokens for info in infos),
        "max_tokens": first.max_tokens,
        "preemptions": sum(info.num_preemptions for info in infos),
    }
    if len(infos) > 1:
        state["parts"] = [_state(info.request_id, [info]) for info in infos]
    return state
