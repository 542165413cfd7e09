"""One API request as requests to the engine: one for each of its choices.

The choices of a prompt share it. The first is started alone, and the others when it has got its
first token: by then the prompt has been computed, and they find it in the prefix cache. The choices
live and die together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from headway.core.request import SamplingParams
from headway.engine.async_engine import AsyncEngine
from headway.engine.outputs import CompletionOutput, RequestOutput
from headway.server.active import ActiveRequest

__all__ = ["Generation", "Outputs"]

#: What came at once: of each choice that has something new, its index and its output.
Outputs = list[tuple[int, RequestOutput]]

_NUM_SEEDS = 2**64


@dataclass(frozen=True)
class Generation:
    """The choices of an API request: number ``p·n + i`` is the i-th of prompt p.

    Attributes:
        request: what they belong to.
        prompts: tokens of each prompt.
        params: of each choice; with a seed, the i-th choice of a prompt has the i-th after it.
        num_choices: of each prompt, n.
    """

    request: ActiveRequest
    prompts: Sequence[list[int]]
    params: SamplingParams
    num_choices: int

    async def run(self, engine: AsyncEngine) -> AsyncGenerator[Outputs, None]:
        """Generate; closing the iterator aborts whatever is unfinished.

        An output is valid until the next step of the iterator.

        Raises:
            HeadwayError: as ``AsyncEngine.generate``; all choices have been aborted.
        """
        streams = [
            self._choice(engine, index, request_id)
            for index, request_id in enumerate(self.request.priorities)
        ]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for output in stream:
                    yield [(0, output)]
            return
        waiting: dict[asyncio.Task[RequestOutput], int] = {}
        begun: set[int] = set()

        def ask(index: int) -> None:
            waiting[asyncio.create_task(_next(streams[index]))] = index

        try:
            for index in range(0, len(streams), self.num_choices):
                ask(index)
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                outputs = sorted((waiting.pop(task), task.result()) for task in done)
                yield outputs
                for index, output in outputs:
                    if not output.finished:
                        ask(index)
                    if index % self.num_choices == 0 and index not in begun:
                        begun.add(index)
                        for follower in range(index + 1, index + self.num_choices):
                            ask(follower)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    async def _choice(
        self, engine: AsyncEngine, index: int, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        request, params = self.request, self.params
        prompt, number = self.prompts[index // self.num_choices], index % self.num_choices
        priority = request.priorities[request_id]
        if request_id in request.cancelled:  # before it has begun
            yield RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=prompt,
                outputs=[CompletionOutput(finish_reason="abort")],
                finished=True,
                priority=priority,
                sampling_params=params,
            )
            return
        if params.seed is not None:
            params = replace(params, seed=(params.seed + number) % _NUM_SEEDS)
        outputs = engine.generate(
            prompt,
            params,
            request_id,
            priority=priority,
            # The others have been let in with the first.
            wait_for_room=number > 0,
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output


async def _next(stream: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return await anext(stream)
