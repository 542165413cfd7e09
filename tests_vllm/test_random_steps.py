"""Random loads, step by step: whatever comes, what must hold after a step holds after each.

The random numbers are the same in every run. A case is a scheduler, a model runner, a policy, a
way to share, and whether KV blocks are scarce; everything else is drawn.
"""

from __future__ import annotations

import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engine_loop import EngineLoop
from scheduler_harness import Lenient, make_scheduler
from step_checks import StepCheck
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from headway.vllm import HeadwayScheduler, HeadwaySyncScheduler

NUM_STEPS = 350
#: What a step, a token of prefill and a decoding request cost (ms), where time is bounded.
COSTS = (5.0, 0.5, 0.5)
NUM_ADAPTERS = 4
#: Targets of classes; requests have the priorities 0, 5 and 10.
SLOS = (
    ["0:ttft=100ms"],
    ["0:tpot=15ms", "5:tpot=25ms"],
    ["0:ttft=60ms,tpot=12ms", "5:ttft=300ms"],
    ["5:ttft=80ms", "10:ttft=50ms,tpot=20ms"],
)


class Case(NamedTuple):
    """What is not drawn."""

    cls: type
    v2: bool
    policy: str
    share: str
    scarce: bool

    @property
    def is_greedy(self) -> bool:
        """Whether only slots and tokens are short, so that one can say who must be in a step."""
        return self.share == "all" and not self.v2 and not self.scarce

    def __str__(self) -> str:
        runner, blocks = ("v2" if self.v2 else "v1"), ("scarce" if self.scarce else "plenty")
        kind = "sync" if self.cls is HeadwaySyncScheduler else "async"
        return f"{kind}-{runner}-{self.policy}-{self.share}-{blocks}"


CASES = [
    Case(cls, v2, policy, share, scarce)
    for cls in (HeadwayScheduler, HeadwaySyncScheduler)
    for v2 in (False, True)
    for policy in ("priority", "aging", "deadline", "fcfs")
    for share in ("all", "none", "30ms")
    for scarce in (False, True)
]


class CheckedLoop(EngineLoop):
    """Every step is checked."""

    def __init__(self, *args: Any, is_greedy: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_greedy = is_greedy

    def schedule(self) -> SchedulerOutput:
        check = StepCheck(self.scheduler)
        output = super().schedule()
        check(output)
        if self.is_greedy:
            check.check_greedy(output.num_scheduled_tokens)
        if not self.in_flight:
            check.check_progress()
        return output


class Load:
    """Clients that do whatever they may, drawn from ``rng``."""

    def __init__(self, loop: CheckedLoop, rng: random.Random) -> None:
        self.loop = loop
        self.scheduler = loop.scheduler
        self.rng = rng
        self.has_sessions = rng.random() < 0.3 and not self.scheduler.num_spec_tokens
        # A request that finds in the cache what the same step computes leaves its tokens unused.
        self.shares_prompts = not loop.is_greedy
        self.is_throttled = rng.random() < 0.3 and not loop.is_greedy
        self.now = 0.0
        self.num_requests = 0
        self.grammars: list[Future[Any]] = []
        #: Sessions that are open, and how much more they will say.
        self.sessions: dict[str, int] = {}
        self.shared = rng.choices(range(10, 40_000), k=80)

    def act(self) -> None:
        """What happens between two steps."""
        rng, scheduler = self.rng, self.scheduler
        self.now += 0.05
        while rng.random() < 0.2 and len(scheduler.requests) < 20:
            self._arrive()
        if rng.random() < 0.03 and scheduler.requests:
            gone = rng.sample(list(scheduler.requests), rng.randint(1, 2) % len(scheduler.requests))
            self.loop.abort(*gone)
        for grammar in self.grammars:
            if not grammar.done() and rng.random() < 0.1:
                self._compile(grammar)
        for session in list(self.sessions):
            if rng.random() < 0.1:
                self._say_more(session)
        if self.is_throttled:
            self.loop.throttles = rng.random() < 0.5
        if rng.random() < 0.01 and not scheduler.kv_holding_waiting:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        if scheduler.pause_state != PauseState.UNPAUSED:
            if rng.random() < 0.2:
                scheduler.set_pause_state(PauseState.UNPAUSED)
        elif rng.random() < 0.01:
            scheduler.set_pause_state(rng.choice((PauseState.PAUSED_NEW, PauseState.PAUSED_ALL)))

    def end(self) -> None:
        """Nothing more comes, and no request waits for a client."""
        self.loop.throttles = False
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        for grammar in self.grammars:
            if not grammar.done():
                self._compile(grammar)
        for session in self.sessions:
            if session in self.scheduler.requests:
                self.loop.end_session(session)

    def _arrive(self) -> None:
        """One request, or the ``n`` of a body."""
        rng = self.rng
        length = rng.choice((1, 15, 16, 17, rng.randint(1, 60), rng.randint(60, 250)))
        prompt: int | list[int] = length
        if self.shares_prompts:
            prompt = rng.choices(range(10, 40_000), k=length)
            if rng.random() < 0.3:
                prompt = self.shared[: rng.randint(1, 80)] + prompt
        options: dict[str, Any] = {
            "max_tokens": rng.randint(1, 60),
            "priority": rng.choice((0, 0, 5, 5, 5, 10)),
            "arrival_time": self.now - rng.choice((0.0, 0.0, rng.random())),
            "stops": rng.random() < 0.5,
        }
        if self.scheduler.lora_config is not None:
            options["lora"] = rng.randint(0, NUM_ADAPTERS)
        if rng.random() < 0.3:
            options["extra_args"] = {"headway_ttft_ms": rng.choice((0, 300, 5000))}
        for _ in range(rng.choice((1, 1, 1, 1, rng.randint(2, 4)))):
            self.num_requests += 1
            name = f"r{self.num_requests}"
            if rng.random() < 0.1:
                grammar: Future[Any] = Future()
                self.grammars.append(grammar)
                self.loop.add(name, prompt, grammar=grammar, **options)
            elif self.has_sessions and rng.random() < 0.15:
                self.sessions[name] = rng.randint(0, 2)
                self.loop.add(name, min(length, 100), resumable=True, **options)
            else:
                self.loop.add(name, prompt, **options)

    def _compile(self, grammar: Future[Any]) -> None:
        if self.rng.random() < 0.2:
            grammar.set_exception(ValueError("no grammar"))
        else:
            grammar.set_result(Lenient())

    def _say_more(self, name: str) -> None:
        session = self.scheduler.requests.get(name)
        if session is None:
            del self.sessions[name]
        elif not self.sessions[name]:
            self.loop.end_session(name)
            del self.sessions[name]
        elif session.status == RequestStatus.WAITING_FOR_STREAMING_REQ or self.rng.random() < 0.1:
            self.sessions[name] -= 1
            self.loop.add(
                name,
                self.rng.randint(1, 60),
                max_tokens=session.max_tokens,
                arrival_time=self.now,
                stops=bool(session.sampling_params.stop_token_ids),
                resumable=True,
            )


def draw(case: Case, rng: random.Random) -> dict[str, Any]:
    """Arguments for ``make_scheduler``."""
    max_num_seqs = rng.choice((2, 4, 8))
    headway: dict[str, Any] = {
        "policy": case.policy,
        "share": case.share,
        "victim": rng.choice(("cheapest", "last")),
        "max_preemptions": rng.choice((1, 3)),
        "prefill_share": 1.0 if case.is_greedy else rng.choice((0.25, 1.0)),
    }
    if case.policy == "aging":
        headway["tau_s"] = rng.choice((0.1, 1.0))
    if case.policy == "deadline":
        headway["margin_s"] = rng.choice((0.0, 0.1))
    if rng.random() < 0.2 and not case.is_greedy:
        headway["max_step_ms"] = 20
    if rng.random() < 0.4 and not case.is_greedy:
        headway["slos"] = rng.choice(SLOS)
    settings: dict[str, Any] = {
        "headway": headway,
        "v2": case.v2,
        "max_num_seqs": max_num_seqs,
        "max_num_active_seqs": rng.choice((None, max_num_seqs, max_num_seqs - 1)),
        "max_num_batched_tokens": rng.choice((32, 64, 512)),
        "num_blocks": rng.randint(28, 40) if case.scarce else 1500,
        "long_prefill_token_threshold": rng.choice((0, 0, 24)),
        "max_loras": 0 if case.is_greedy else rng.choice((0, 0, 2)),
        "watermark": rng.choice((0.0, 0.0, 0.05)),
        "scheduler_reserve_full_isl": rng.random() < 0.7,
    }
    if rng.random() < 0.25 and not case.is_greedy:
        settings["prefill_schedule_interval"] = rng.randint(2, 6)
    if rng.random() < 0.25 and not case.is_greedy:
        settings["num_speculative_tokens"] = 2
    return settings


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_must_hold_holds_after_every_step(case: Case, bare_model: Path) -> None:
    rng = random.Random(str(case))
    settings = draw(case, rng)
    scheduler = make_scheduler(case.cls, bare_model, **settings)
    loop = CheckedLoop(
        scheduler,
        seed=rng.randrange(100),
        costs=COSTS if scheduler.headway_config.is_timed else None,
        is_greedy=case.is_greedy,
    )
    load = Load(loop, rng)
    for _ in range(NUM_STEPS):
        load.act()
        loop.step()
    load.end()
    loop.run()
    loop.check_done()
