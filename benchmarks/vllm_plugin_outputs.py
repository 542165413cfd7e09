"""Whether greedy outputs are the same with the plug-in, and if not, by how little they differ.

In vLLM a row's sums depend on what else is in the step: where two tokens are nearly as likely as
each other, another company may choose the other. In bf16, where logits near 20 are 0.125 apart,
that is often. So the same requests in another order, without the plug-in, show what to expect, and
float32 shows what is left without such ties. For each first difference it is told how much more
likely the chosen token was than the next, and whether the other chose that one. How much the
company matters is seen where both chose the same: by how much its probability differs.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import Any, NamedTuple

from openai_load import Client, Prompts
from vllm_plugin_server import BLOCK_SIZE, num_preemptions

from headway.engine.metrics import percentile

REQUESTS = 200
CONCURRENCY = 48
MAX_TOKENS = 48
MIN_WORDS, MAX_WORDS = 16, 400
MAX_NUM_SEQS = 16
#: Half of what as many sequences need, so that some are preempted for blocks, too.
NUM_BLOCKS = MAX_NUM_SEQS * ((MIN_WORDS + MAX_WORDS) // 2 + MAX_TOKENS) // BLOCK_SIZE // 2
FLAGS = ("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS))
#: dtype → servers: name, what the plug-in is told (None: plain), the orders of its rounds. The
#: first round is what the others are compared with.
ROUNDS: dict[str, tuple[tuple[str, dict[str, Any] | None, tuple[int, ...]], ...]] = {
    "bfloat16": (("plain", None, (1, 2)), ("plug-in", {}, (1,))),
    "float32": (("plain", None, (1,)), ("plug-in", {}, (1,))),
}


class Token(NamedTuple):
    """A token of an output.

    Attributes:
        chosen: the most likely.
        next_best: the second most likely.
        logprob: of the chosen one.
        margin: how far above the next best it is.
    """

    chosen: str
    next_best: str
    logprob: float
    margin: float


class Round(NamedTuple):
    """All requests once; ``outputs`` in the same order whatever order they were made in."""

    outputs: list[list[Token]]
    preemptions: float


async def run(client: Client, seed: int) -> Round:
    """Make the requests in an order that ``seed`` shuffles."""
    await client.prepare()
    before = await num_preemptions(client)
    prompts, rng = Prompts(0), random.Random(0)
    requests = [
        (prompts.next(rng.randint(MIN_WORDS, MAX_WORDS)), rng.choice((0, 5, 10)))
        for _ in range(REQUESTS)
    ]
    order = list(range(REQUESTS))
    random.Random(seed).shuffle(order)
    outputs: list[list[Token]] = [[] for _ in requests]
    pending = iter(order)

    async def work() -> None:
        for index in pending:
            prompt, priority = requests[index]
            answer = await client.answer(
                prompt,
                MAX_TOKENS,
                priority,
                logprobs=2,
                return_tokens_as_token_ids=True,  # their texts need not differ
                cache_salt=str(seed),  # nothing is found that another round computed
            )
            outputs[index] = _tokens(answer["choices"][0]["logprobs"])

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return Round(outputs, await num_preemptions(client) - before)


def _tokens(logprobs: dict[str, Any]) -> list[Token]:
    tokens = []
    for chosen, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        next_best = max((name for name in top if name != chosen), key=top.__getitem__)
        tokens.append(Token(chosen, next_best, top[chosen], top[chosen] - top[next_best]))
    return tokens


def compare(ours: Round, theirs: Round) -> dict[str, Any]:
    """How many outputs differ, where, and how narrow our choice was there."""
    firsts: list[tuple[int, Token, Token]] = []
    noise: list[float] = []
    for our, their in zip(ours.outputs, theirs.outputs, strict=True):
        for index, (one, other) in enumerate(zip(our, their, strict=True)):
            if one.chosen != other.chosen:
                firsts.append((index, one, other))
                break  # from here on the texts differ
            noise.append(abs(one.logprob - other.logprob))
    return {
        "requests": len(ours.outputs),
        "preemptions": [ours.preemptions, theirs.preemptions],
        "differ": len(firsts),
        "first at token": sorted(index for index, _, _ in firsts),
        "chose the other way round": sum(
            our.next_best == their.chosen and their.next_best == our.chosen
            for _, our, their in firsts
        ),
        "margins there": sorted(our.margin for _, our, _ in firsts),
        "margin of all tokens, median": statistics.median(
            token.margin for tokens in ours.outputs for token in tokens
        ),
        "noise, p50": statistics.median(noise),
        "noise, p99": percentile(noise, 99),
        "noise, largest": max(noise),
    }
