"""Before the first request: kernels are compiled, and the cost model knows the machine.

The first step of each shape is slow, and a model that has seen no step cannot keep a bound. A short
load of every kind of step, of made-up tokens, takes care of both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from headway.core.policy import PriorityPolicy
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.engine.engine import Engine

__all__ = ["warm_up"]

_CONTEXT: Final = 1024
_NUM_TOKENS: Final = 6
_WIDTHS: Final = (1, 2, 4, 8, 16, 32, 64)


def warm_up(engine: Engine, progress: Callable[[float], None] | None = None) -> None:
    """Serve a made-up load on the engine's executor; takes two or three seconds.

    Nothing of it is left in the engine but what its cost model has learnt.

    Args:
        engine: must not have served anything yet.
        progress: told the fraction that is done.
    """
    assert not engine.has_work
    assert engine.tokenizer is not None
    scheduler = engine.scheduler
    # A policy of its own: the engine's may keep what it is shown.
    config = replace(
        scheduler.config,
        policy=PriorityPolicy.name,
        max_step_ms=None,
        slos=(),
        enable_prefix_caching=True,
    )
    own = Engine(
        engine.executor,
        PriorityScheduler(config=config, cost_model=scheduler.cost_model),
        clock=engine.clock,
    )
    vocab_size = engine.tokenizer.vocab_size
    chance = random.Random(0)
    longest = min(_CONTEXT, config.max_request_tokens - _NUM_TOKENS)

    def prompt(length: int) -> list[int]:
        return [chance.randrange(vocab_size) for _ in range(max(1, min(length, longest)))]

    def loads() -> Iterator[list[list[int]]]:
        """Chunks of all sizes and decodes of all widths, at short contexts, then at a long one.

        That costs one prefill: the others find it in the prefix cache.
        """
        for width in widths:
            yield [prompt(256 // width + index % 7) for index in range(width)]
        shared = prompt(longest)
        yield [shared]
        for width in widths[:-1]:
            yield [shared[:-1] for _ in range(width)]

    widths = [width for width in _WIDTHS if width <= config.max_num_seqs]
    rounds = [list(loads()) for _ in range(2)]  # the first compiles; the second shows the times
    params = SamplingParams(max_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
    num_done = 0
    for one_round in rounds:
        scheduler.cost_model.reset()
        for prompts in one_round:
            for index, token_ids in enumerate(prompts):
                request_id = f"warm-up-{num_done}-{index}"
                own.submit(Request(request_id, prompt_token_ids=token_ids, sampling_params=params))
            while own.has_work:
                own.step()
            num_done += 1
            if progress is not None:
                progress(num_done / (len(rounds) * len(one_round)))
    scheduler.cost_model.calibrate()
    engine.publish_statistics()
