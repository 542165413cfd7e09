"""What an API request asks of the engine: a group of choices for each prompt.

The engine serves the choices of a prompt as one request, whose prompt is computed once. A group is
in the KV pool as a whole, so a prompt with more choices than a step has room for, or whose choices
would not fit into the pool at full length, is divided into several groups. The groups of an API
request live and die together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from headway.core.sampling_params import SamplingParams, choice_seed
from headway.engine.client import EngineClient, EngineDescription
from headway.engine.outputs import RequestOutput
from headway.server.active import ActiveRequest
from headway.server.edge.tenants import Tenant
from headway.server.protocol.answer_format import Outputs

__all__ = ["ChoiceGroup", "Generation", "choice_groups"]


class ChoiceGroup(NamedTuple):
    """Choices of one prompt, which are one request to the engine.

    Attributes:
        prompt: its tokens.
        params: of each choice; a seed is the first choice's, and the others have the next ones.
        first_index: of the choices in the answer.
        num_choices: so many.
    """

    prompt: list[int]
    params: SamplingParams
    first_index: int
    num_choices: int


class Generation(NamedTuple):
    """All choices of an API request.

    Attributes:
        request: what they belong to; it has a part for each group.
        groups: in the order of the choices.
        tenant: whose they are.
        priority: of every group.
        cache_salt: what else than their tokens decides whether they share cached prefixes.
    """

    request: ActiveRequest
    groups: Sequence[ChoiceGroup]
    tenant: Tenant
    priority: int
    cache_salt: str

    @property
    def num_choices(self) -> int:
        """Of all groups."""
        return sum(group.num_choices for group in self.groups)

    async def run(self, engine: EngineClient) -> AsyncGenerator[Outputs, None]:
        """Generate; closing the iterator aborts whatever is unfinished.

        All groups are submitted at once. An output is valid until the next step of the iterator.

        Raises:
            HeadwayError: as ``EngineClient.generate``; all groups have been aborted.
        """
        streams = [
            engine.generate(
                group.prompt,
                group.params,
                part_id,
                n=group.num_choices,
                priority=self.priority,
                tenant=self.tenant.name,
                cache_salt=self.cache_salt,
                cache_group=self.tenant.cache_group,
            )
            for part_id, group in zip(self.request.part_ids, self.groups, strict=True)
        ]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for output in stream:
                    yield [(0, output)]
            return
        waiting: dict[asyncio.Task[RequestOutput], int] = {}

        def ask(number: int) -> None:
            waiting[asyncio.create_task(_next(streams[number]))] = number

        try:
            for number in range(len(streams)):
                ask(number)
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                outputs = {waiting.pop(task): task.result() for task in done}
                yield [
                    (self.groups[number].first_index, outputs[number]) for number in sorted(outputs)
                ]
                for number, output in outputs.items():
                    # After what was generated before an error comes the error.
                    if not output.finished or output.error is not None:
                        ask(number)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()


def choice_groups(
    prompts: Sequence[list[int]],
    params: SamplingParams,
    num_choices: int,
    engine: EngineDescription,
) -> Iterator[ChoiceGroup]:
    """The choices of each prompt, divided into as few groups as the engine can serve.

    Choice ``p·n + i`` of the answer is the i-th of prompt p. Its draws are those that it would have
    in a group of all n, wherever it is.

    Args:
        prompts: tokens of each.
        params: of every choice.
        num_choices: of each prompt, n.
        engine: what it has room for.
    """
    for prompt_number, prompt in enumerate(prompts):
        most = _most_choices(len(prompt), params.max_tokens, engine)
        for start in range(0, num_choices, most):
            own = params
            if params.seed is not None and start:
                own = replace(params, seed=choice_seed(params.seed, start))
            count = min(most, num_choices - start)
            yield ChoiceGroup(prompt, own, prompt_number * num_choices + start, count)


def _most_choices(num_prompt_tokens: int, max_tokens: int, engine: EngineDescription) -> int:
    """The largest group: choices share the blocks that the prompt fills, and need more each."""
    longest = min(num_prompt_tokens + max_tokens, engine.max_request_tokens)
    num_shared = num_prompt_tokens // engine.block_size
    num_own = -(-longest // engine.block_size) - num_shared
    fitting = max(0, engine.num_blocks - num_shared) // max(1, num_own)
    return max(1, min(engine.max_num_choices, fitting))


async def _next(stream: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return await anext(stream)
