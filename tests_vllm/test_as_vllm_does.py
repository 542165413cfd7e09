"""Where the plug-in has nothing to decide, vLLM does what it always does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_loop import EngineLoop
from scheduler_harness import make_scheduler
from story import BACKGROUND, URGENT
from vllm.config import KVTransferConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from headway.core.errors import ConfigError
from headway.vllm import HeadwayScheduler, HeadwaySyncScheduler


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize(
    ("cls", "plain"),
    [(HeadwayScheduler, AsyncScheduler), (HeadwaySyncScheduler, Scheduler)],
    ids=["async", "sync"],
)
def test_among_equals_with_blocks_for_all_each_step_is_vllms_own(
    cls: type[Scheduler], plain: type[Scheduler], interval: int, v2: bool, bare_model: Path
) -> None:
    settings: dict[str, Any] = {
        "v2": v2,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "prefill_schedule_interval": interval,
    }
    ours = EngineLoop(make_scheduler(cls, bare_model, **settings))
    theirs = EngineLoop(make_scheduler(plain, bare_model, **settings))
    rng = random.Random(7)
    shared = rng.choices(range(10, 40_000), k=100)
    for i in range(600):
        if i < 500 and rng.random() < 0.3:
            prompt = shared[: rng.randint(0, 100)]
            prompt = prompt + rng.choices(range(10, 40_000), k=rng.randint(1, 200))
            options = {"max_tokens": rng.randint(1, 40), "stops": rng.random() < 0.5}
            for loop in (ours, theirs):
                loop.add(f"r{i}", prompt, arrival_time=float(i), **options)
        if rng.random() < 0.05 and ours.scheduler.requests:
            gone = rng.choice(list(ours.scheduler.requests))
            for loop in (ours, theirs):
                loop.abort(gone)
        a, b = ours.step(), theirs.step()
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.num_scheduled_tokens == b.num_scheduled_tokens
            assert a.preempted_req_ids == b.preempted_req_ids == set()
    for loop in (ours, theirs):
        loop.run()
        loop.check_done()


def test_where_vllm_does_not_schedule_asynchronously_neither_does_the_plug_in(
    bare_model: Path,
) -> None:
    assert type(make_scheduler(HeadwayScheduler, bare_model)) is HeadwayScheduler
    scheduler = make_scheduler(HeadwayScheduler, bare_model, is_async=False)
    assert type(scheduler) is HeadwaySyncScheduler


def test_with_a_kv_connector_scheduling_is_left_to_vllm(
    bare_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    connector = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path)},
    )
    steps = []
    for cls in (HeadwayScheduler, AsyncScheduler):
        scheduler = make_scheduler(cls, bare_model, max_num_seqs=1, kv_transfer_config=connector)
        loop = EngineLoop(scheduler)
        loop.add("a", 40, priority=BACKGROUND)
        outputs = [loop.step()]
        loop.add("urgent", 40, priority=URGENT)
        outputs += [loop.step() for _ in range(60)]
        steps.append([output and output.num_scheduled_tokens for output in outputs])
        loop.run()
        loop.check_done()
    assert steps[0] == steps[1]
    assert caplog.text.count("Headway leaves scheduling to vLLM: a KV connector") == 1


@pytest.mark.parametrize("key", ["victim", "priority", "slots"])
def test_a_bad_setting_stops_the_start(bare_model: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"headway in --additional-config: .*{key}"):
        make_scheduler(HeadwayScheduler, bare_model, headway={key: "dearest"})
