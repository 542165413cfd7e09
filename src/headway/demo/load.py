"""What the demo serves: batch work that arrives at once, and urgent questions in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from headway.core.request import Request, SamplingParams

__all__ = [
    "BATCH_PRIORITY",
    "DEFAULT_SECONDS",
    "MAX_MODEL_LEN",
    "NUM_BATCH",
    "NUM_SLOTS",
    "URGENT_PRIORITY",
    "Arrival",
    "Load",
    "make_load",
    "read_prompts",
]

NUM_SLOTS = 8
NUM_BATCH = 24
BATCH_PRIORITY, URGENT_PRIORITY = 10, 0
#: Longest context in tokens; batch work is cut to fit well within.
MAX_MODEL_LEN = 1024

#: How long a run should take, in seconds.
DEFAULT_SECONDS = 28.0
#: Of the speed with short contexts and full slots, what remains over a whole run.
_EFFICIENCY = 0.8
#: Mean length of a batch output, in tokens: enough to see, and no more than the context holds.
_SHORTEST, _LONGEST = 24.0, 600.0
#: Batch outputs are this much shorter or longer than the mean, so that they end one by one.
_SPREAD = 0.4
#: Of the blocks that batch requests in every slot would fill at their end, the pool has this
#: share. They are seldom all near their end: mostly they just fit, sometimes a request must yield.
_POOL_SHARE = 0.6
_URGENT_TOKENS = 16
_URGENT_EVERY = 2.0
_URGENT_JITTER = 0.5


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come.

    Attributes:
        time: seconds after the start.
        request_id: ``batch-01``, ``urgent-01``, …
        priority: smaller is more urgent.
        token_ids: of the prompt.
        max_tokens: to generate; batch work generates exactly as many.
    """

    time: float
    request_id: str
    priority: int
    token_ids: tuple[int, ...]
    max_tokens: int

    def request(self, start: float) -> Request:
        """The request itself, for a run that started at ``start`` on the engine's clock."""
        params = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0,
            ignore_eos=self.priority == BATCH_PRIORITY,
        )
        return Request(
            self.request_id,
            self.priority,
            prompt_token_ids=self.token_ids,
            sampling_params=params,
            arrival_time=start + self.time,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """The same for every policy.

    Attributes:
        arrivals: in order of time.
        num_blocks: size of the KV pool.
        seconds: the batch work is expected to take.
    """

    arrivals: tuple[Arrival, ...]
    num_blocks: int
    seconds: float


def read_prompts() -> dict[str, list[str]]:
    """The prompts of ``prompts.txt`` by section."""
    sections: dict[str, list[str]] = {}
    prompts: list[str] = []
    text = files("headway.demo").joinpath("prompts.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            prompts = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            prompts.append(line)
    return sections


def make_load(
    encode: Callable[[str], Sequence[int]],
    tokens_per_second: float,
    block_size: int,
    max_num_blocks: int,
    seed: int = 0,
    seconds: float = DEFAULT_SECONDS,
) -> Load:
    """Work that keeps a machine of this speed busy for about so many seconds.

    Args:
        encode: a prompt's tokens.
        tokens_per_second: of decoding with all slots in use.
        block_size: tokens in a KV block.
        max_num_blocks: that the pool could have.
        seed: of lengths and arrival times.
        seconds: that a run should take.
    """
    rng = random.Random(seed)
    prompts = read_prompts()
    texts, questions = prompts["batch"][:NUM_BATCH], prompts["urgent"]
    batch_prompts = [tuple(encode(text)) for text in texts]

    # All that has to be computed, in units of a decoded token; prefill is cheaper by the token.
    speed = tokens_per_second * _EFFICIENCY
    other_work = sum(map(len, batch_prompts)) / 2 + seconds / _URGENT_EVERY * _URGENT_TOKENS
    mean = (speed * seconds - other_work) / NUM_BATCH
    mean = min(max(mean, _SHORTEST), _LONGEST)
    batch = [
        Arrival(
            0.0,
            f"batch-{number:02}",
            BATCH_PRIORITY,
            prompt,
            int(mean * rng.uniform(1 - _SPREAD, 1 + _SPREAD)),
        )
        for number, prompt in enumerate(batch_prompts, 1)
    ]
    seconds = (sum(arrival.max_tokens for arrival in batch) + other_work) / speed
    urgent: list[Arrival] = []
    time = _URGENT_EVERY
    while time < seconds * 0.85:  # the last ones, too, find the batch work going on
        question = tuple(encode(questions[len(urgent) % len(questions)]))
        request_id = f"urgent-{len(urgent) + 1:02}"
        urgent.append(Arrival(time, request_id, URGENT_PRIORITY, question, _URGENT_TOKENS))
        time += _URGENT_EVERY + rng.uniform(-_URGENT_JITTER, _URGENT_JITTER)
    blocks = [-(-(len(arrival.token_ids) + arrival.max_tokens) // block_size) for arrival in batch]
    num_blocks = max(int(sum(blocks) / len(blocks) * NUM_SLOTS * _POOL_SHARE), *blocks) + 1
    return Load((*batch, *urgent), min(num_blocks, max_num_blocks), seconds)
