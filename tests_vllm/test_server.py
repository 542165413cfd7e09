"""A real vLLM server with the plug-in: slots and blocks are short, and nothing is lost.

Four slots, and KV blocks for 992 tokens. In float32 an answer does not depend on the load, so what
was paused or evicted can be compared, token for token, with the same request on the idle server.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from adapters import RANK, write_adapter
from streams import Client, Stream, begun, hang_up

from server import Server, fail_to_start, serve

pytestmark = pytest.mark.anyio

NUM_SLOTS = 4
#: A background stream's answer: many steps longer than an urgent request needs, for the server goes
#: on while a busy machine lets the client wait.
NUM_TOKENS = 96
#: The answer of a stream that is not to end by itself.
ENDLESS = 900
#: What an urgent request says; background streams say 10.
URGENT = {"priority": 0}

FLAGS = (
    *("--dtype", "float32", "--max-model-len", "960", "--max-num-batched-tokens", "256"),
    *("--max-num-seqs", str(NUM_SLOTS), "--block-size", "32", "--num-gpu-blocks-override", "32"),
)
ASYNC = ("--scheduler-cls", "headway.vllm.HeadwayScheduler")
SYNC = ("--scheduler-cls", "headway.vllm.HeadwaySyncScheduler", "--no-async-scheduling")
ONE_ADAPTER = ("--enable-lora", "--max-loras", "1", "--max-lora-rank", str(RANK), "--lora-modules")


@pytest.fixture(scope="module", params=["priority", "deadline"])
def server(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A running server, named by its policy; its log is in pytest's temporary directory."""
    directory = tmp_path_factory.mktemp(request.param)
    flags, config = [*FLAGS, *ASYNC], {}
    if request.param == "deadline":
        flags = [*FLAGS, *SYNC, *ONE_ADAPTER]
        for seed, name in enumerate(["one", "two"]):
            write_adapter(model, directory / name, seed)
            flags.append(f"{name}={directory / name}")
        config = {"policy": "deadline", "slos": ["0:ttft=300ms"]}
    with serve(model, directory / "vllm.log", flags, config) as server:
        yield server


with_priority = pytest.mark.parametrize("server", ["priority"], indirect=True)
with_deadlines = pytest.mark.parametrize("server", ["deadline"], indirect=True)


@pytest.fixture
async def client(server: Server, model: Path) -> AsyncIterator[Client]:
    """A client of ``server``, which must be idle again at the end of the test."""
    async with Client(server.url, model.name) as client:
        yield client
        await hang_up(client.streams)
        await assert_idle(client, server)


async def assert_idle(client: Client, server: Server) -> None:
    """Nothing is left of the requests that the server was given."""
    # The metrics are as of the last step.
    assert len(await client.alone("Hello", 2)) == 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert await server.becomes(name, 0), name


def story(number: int, num_phrases: int = 1) -> str:
    """A prompt of about ten tokens a phrase that has no block in common with another number's."""
    return f"Story number {number}." + " The sea is wide and the ship is small." * num_phrases


async def assert_overtakes(urgent: Stream, background: Sequence[Stream]) -> None:
    """``urgent`` begins, and ends, while all of ``background`` are at it or wait."""
    await urgent.reach(1)
    assert not any(stream.has_ended for stream in background)
    await urgent.end()
    assert not any(stream.has_ended for stream in background)


async def test_urgent_requests_pause_others_which_lose_nothing(
    client: Client, server: Server
) -> None:
    prompts = [story(number) for number in range(NUM_SLOTS + 2)]
    answers = [await client.alone(prompt, NUM_TOKENS) for prompt in prompts]
    num_preemptions = server.metric("num_preemptions_total")

    async with client.background(prompts, NUM_TOKENS, num_begun=NUM_SLOTS) as background:
        await assert_overtakes(Stream(client, "Is the site down?", 8, **URGENT), background)

    assert [stream.token_ids for stream in background] == answers
    # There were blocks enough, so no request had to recompute anything.
    assert server.metric("num_preemptions_total") == num_preemptions


@with_priority
async def test_blocks_are_taken_and_what_was_lost_is_recomputed(
    client: Client, server: Server
) -> None:
    # Three of nine or ten blocks each leave a slot, and at most four of the seven blocks needed.
    prompts = [story(number, 26) for number in range(NUM_SLOTS - 1)]
    num_tokens = 48
    answers = [await client.alone(prompt, num_tokens) for prompt in prompts]
    num_preemptions = server.metric("num_preemptions_total")

    async with client.background(prompts, num_tokens, num_begun=len(prompts)) as background:
        await assert_overtakes(Stream(client, story(100, 19), 8, **URGENT), background)

    assert [stream.token_ids for stream in background] == answers
    assert server.metric("num_preemptions_total") == num_preemptions + 1


@with_priority
async def test_the_header_overrides_the_priority_of_the_body(client: Client) -> None:
    prompts = [story(number) for number in range(NUM_SLOTS)]
    async with client.background(prompts, NUM_TOKENS, num_begun=NUM_SLOTS) as background:
        urgent = Stream(client, story(100), 4, headers={"X-Vllm-Priority": "0"}, priority=10)
        await assert_overtakes(urgent, background)


@with_deadlines
async def test_a_request_brings_its_deadline(client: Client) -> None:
    prompts = [story(number) for number in range(NUM_SLOTS)]
    async with client.background(prompts, NUM_TOKENS, num_begun=NUM_SLOTS) as background:
        no_deadline = {"priority": 10, "vllm_xargs": {"headway_ttft_ms": "soon"}}
        ignored = Stream(client, story(100), 4, **no_deadline)
        urgent = Stream(client, story(101), 4, priority=10, vllm_xargs={"headway_ttft_ms": 300})
        await assert_overtakes(urgent, [*background, ignored])
        assert not ignored.token_ids
        assert len(await ignored.end()) == 4


@with_priority
async def test_clients_that_hang_up_leave_nothing_behind(client: Client, server: Server) -> None:
    answer = await client.alone(story(0), NUM_TOKENS)
    lost = [Stream(client, story(i), ENDLESS, priority=10) for i in range(1, NUM_SLOTS + 3)]
    await begun(lost, NUM_SLOTS)
    urgent = [Stream(client, story(100 + i), ENDLESS, **URGENT) for i in range(NUM_SLOTS)]
    await begun(urgent, NUM_SLOTS)

    # Four of them are paused, and the others have not begun.
    assert not any(stream.has_ended for stream in lost)
    await hang_up(lost)
    assert await server.becomes("num_requests_running", NUM_SLOTS)
    assert await server.becomes("num_requests_waiting", 0)

    # Some of them compute, and the last one may wait for the others.
    waiting = Stream(client, story(0), NUM_TOKENS, priority=10)
    await hang_up(urgent)
    assert await waiting.end() == answer


@with_priority
async def test_all_choices_of_an_urgent_request_overtake(client: Client) -> None:
    async def choices(priority: int) -> list[list[int]]:
        completion = await client.completions.create(
            model=client.model,
            prompt="Once upon a time",
            n=3,
            max_tokens=8,
            temperature=1.0,
            seed=7,
            extra_body={"priority": priority, "ignore_eos": True, "return_token_ids": True},
        )
        return [choice.token_ids for choice in completion.choices]

    alone = await choices(priority=0)
    assert [len(choice) for choice in alone] == [8, 8, 8]
    assert len(set(map(tuple, alone))) == 3
    prompts = [story(number) for number in range(NUM_SLOTS)]
    async with client.background(prompts, NUM_TOKENS, num_begun=NUM_SLOTS) as background:
        behind = asyncio.create_task(choices(priority=10))
        assert await choices(priority=0) == alone
        assert not any(stream.has_ended for stream in background)
        assert not behind.done()
        assert await behind == alone


@with_priority
async def test_structured_output_keeps_its_structure(client: Client) -> None:
    pattern = r"[A-Z][a-z]{2,7} is [1-9][0-9] years old, and lives in [A-Z][a-z]{2,7}\."

    async def person(priority: int) -> str:
        completion = await client.completions.create(
            model=client.model,
            prompt="Tell me about a person. ",
            max_tokens=64,
            temperature=0,
            extra_body={"priority": priority, "structured_outputs": {"regex": pattern}},
        )
        return completion.choices[0].text

    alone = await person(priority=0)
    assert re.fullmatch(pattern, alone)
    prompts = [story(number) for number in range(NUM_SLOTS)]
    async with client.background(prompts, 2 * NUM_TOKENS, num_begun=NUM_SLOTS) as background:
        # The first one is paused by the four that come after it.
        paused = asyncio.create_task(person(priority=5))
        urgent = [asyncio.create_task(person(priority=0)) for _ in range(NUM_SLOTS)]
        assert await asyncio.gather(*urgent) == [alone] * NUM_SLOTS
        assert not any(stream.has_ended for stream in background)
        assert await paused == alone


@with_deadlines
async def test_adapters_take_turns(client: Client) -> None:
    one = await client.alone(story(0), NUM_TOKENS, "one")
    two = await client.alone(story(0), NUM_TOKENS, "two")
    assert one != two
    async with client.background([story(0)] * 3, NUM_TOKENS, num_begun=3, model="one") as first:
        behind = Stream(client, story(0), NUM_TOKENS, model="two", priority=10)
        # There is room for one adapter in a step: the others cannot even ride along.
        urgent = Stream(client, story(0), 8, model="two", **URGENT)
        await assert_overtakes(urgent, [*first, behind])
        assert await behind.end() == two
    assert [stream.token_ids for stream in first] == [one] * 3
    assert urgent.token_ids == two[:8]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"polcy": "aging"}, "unknown key 'polcy', must be one of policy, "),
        ({"share": "40"}, "share is '40', must be all, none, or a time such as 40ms"),
    ],
)
def test_a_mistake_in_the_configuration_stops_the_start(
    config: dict[str, Any], complaint: str, model: Path, tmp_path: Path
) -> None:
    output = fail_to_start(model, tmp_path / "vllm.log", [*FLAGS, *ASYNC], config)
    error = f"ConfigError: headway in --additional-config: {complaint}"
    assert any(error in line for line in output.splitlines())
