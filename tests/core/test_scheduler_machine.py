"""Random lives of a scheduler: whatever happens, in whatever order, the invariants hold."""

from __future__ import annotations

import os

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput
from headway.core.slo import SLO

EOS = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, schedules, finishes, aborts, preempts, forks and re-ranks in tiny pools.

    A model of the pool's contents runs along: for every block, which token at which position
    of which history it holds. It is what the executor would see, so it proves that every
    computed token of every request is where the request's block table says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.now = 0.0
        self.accepted: set[str] = set()
        self.ended: set[str] = set()
        self.outputs: dict[str, list[int]] = {}
        #: Request id → how many of its first tokens it has computed once.
        self.computed: dict[str, int] = {}

    @initialize(
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, 24),
        num_blocks=st.integers(2, 14),
        block_size=st.sampled_from([1, 2, 4]),
        num_swap_blocks=st.sampled_from([0, 3, 20]),
        policy=st.sampled_from(["fcfs", "priority", "aging", "deadline"]),
        mode=st.sampled_from(list(PreemptionMode)),
        prefix_caching=st.booleans(),
        deterministic=st.booleans(),
        max_step_ms=st.sampled_from([None, None, 8.0]),
        slos=st.sampled_from([(), (), (SLO(0, 30.0, 7.0), SLO(2, None, 9.0))]),
    )
    def configure(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_blocks: int,
        block_size: int,
        num_swap_blocks: int,
        policy: str,
        mode: PreemptionMode,
        prefix_caching: bool,
        deterministic: bool,
        max_step_ms: float | None,
        slos: tuple[SLO, ...],
    ) -> None:
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=block_size,
            num_swap_blocks=num_swap_blocks,
            policy=policy,
            preemption_mode=mode,
            enable_prefix_caching=prefix_caching,
            deterministic=deterministic,
            max_step_ms=max_step_ms,
            slos=slos,
            eos_token_ids=frozenset({EOS}),
        )
        self.scheduler = PriorityScheduler(config=config)
        #: block or ("swap", slot) → contents by offset: the tokens up to and including it.
        self.memory: dict[int, dict[int, tuple[int, ...]]] = {}
        self.swap: dict[int, dict[int, tuple[int, ...]]] = {}

    @rule(
        priority=st.integers(-2, 3),
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        deadline=st.none() | st.floats(0, 50),
        prompt_logprobs=st.sampled_from([None, 0]),
    )
    def add(
        self,
        priority: int,
        prompt: list[int],
        max_tokens: int,
        deadline: float | None,
        prompt_logprobs: int | None,
    ) -> None:
        limit = self.scheduler.config.max_request_tokens
        self.count += 1
        request = Request(
            f"r{self.count}",
            priority,
            prompt[: limit - 1],
            sampling_params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
            deadline=deadline,
        )
        self.scheduler.add_request(request, self.now)
        self.accepted.add(request.request_id)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), token=st.integers(0, EOS), elapsed=st.floats(0, 5))
    def step(self, data: st.DataObject, token: int, elapsed: float) -> None:
        self.now += elapsed
        before = {one.request_id: one.num_tokens for one in self.scheduler.requests.values()}
        output = self.scheduler.schedule(self.now)
        invariants.check_output(self.scheduler, output)
        sampled = self.execute(output, token)
        if data.draw(st.integers(0, 9), label="abort in flight") == 0:
            victim = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
            self.abort_one(victim)
            before.pop(victim)
        finished = self.scheduler.update_from_output(output, sampled, self.now)
        for request in finished:
            assert request.status in {
                RequestStatus.FINISHED_STOPPED,
                RequestStatus.FINISHED_LENGTH_CAPPED,
            }
            self.ended.add(request.request_id)
        for request, one in zip(output, sampled, strict=True):
            if request.request_id in before:
                assert request.num_tokens == before[request.request_id] + (one is not None)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.abort_one(data.draw(st.sampled_from(sorted(self.scheduler.requests))))

    @precondition(lambda self: self.scheduler.resident)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.scheduler.resident))
        tokens = list(request.token_ids)
        self.scheduler.preempt(request.request_id, self.now)
        assert request.token_ids == tokens
        assert request.request_id in self.scheduler.waiting_heap

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), priority=st.integers(-3, 4))
    def set_priority(self, data: st.DataObject, priority: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.set_priority(request_id, priority)

    @precondition(lambda self: any(r.num_computed_tokens for r in self.scheduler.resident))
    @rule(data=st.data(), max_tokens=st.integers(1, 8))
    def fork(self, data: st.DataObject, max_tokens: int) -> None:
        parents = [one for one in self.scheduler.resident if one.num_computed_tokens]
        parent = data.draw(st.sampled_from(parents))
        self.count += 1
        child = Request(
            f"r{self.count}",
            parent.priority,
            parent.prompt_token_ids,
            sampling_params=SamplingParams(
                max_tokens=max_tokens + parent.num_output_tokens, ignore_eos=True
            ),
        )
        child.token_ids.extend(parent.output_token_ids)
        self.scheduler.fork(parent.request_id, child, self.now)
        self.accepted.add(child.request_id)

    @invariant()
    def invariants_hold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        invariants.check(self.scheduler)
        assert self.accepted - self.ended == set(self.scheduler.requests), "a request is lost"

    def teardown(self) -> None:
        """Nobody starves: without newcomers, everybody finishes, and the pool is idle again."""
        if not hasattr(self, "scheduler"):
            return
        bound = 64 * (1 + len(self.scheduler.requests)) * 24
        for _ in range(bound):
            if not self.scheduler.requests:
                break
            output = self.scheduler.schedule(self.now)
            invariants.check_output(self.scheduler, output)
            sampled = self.execute(output, 1)
            finished = self.scheduler.update_from_output(output, sampled, self.now)
            self.ended.update(request.request_id for request in finished)
        assert self.accepted == self.ended, "starved"
        statistics = self.scheduler.statistics()
        assert statistics.blocks.held == 0
        assert statistics.num_swap_blocks_used == 0

    # ------------------------------------------------------------------ the pool's model

    def execute(self, output: SchedulerOutput, token: int) -> list[int | None]:
        size = self.scheduler.config.block_size
        self.swap.update({slot: dict(self.memory[block]) for block, slot in output.swap_out})
        for source, destination in output.block_copies:
            self.memory[destination] = dict(self.memory[source])
        for slot, block in output.swap_in:
            self.memory[block] = dict(self.swap[slot])
        sampled: list[int | None] = []
        for request, count in zip(output, output.num_scheduled_tokens, strict=True):
            start, end = request.num_computed_tokens, request.num_computed_tokens + count
            if request.sampling_params.prompt_logprobs is not None:
                # What it skips, it has computed itself before, and nothing is left out.
                seen = self.computed.get(request.request_id, 0)
                assert max(start, request.peak_computed_tokens) == seen
                self.computed[request.request_id] = max(seen, end)
            for position in range(start):
                stored = self.memory[request.block_table[position // size]][position % size]
                assert stored == tuple(request.token_ids[: position + 1]), "foreign contents"
            if self.scheduler.config.deterministic:
                self.assert_computed_as_first_time(request, start, count)
            for position in range(start, end):
                block = self.memory.setdefault(request.block_table[position // size], {})
                block[position % size] = tuple(request.token_ids[: position + 1])
            sampled.append(token if end == request.num_tokens else None)
        return sampled

    @staticmethod
    def assert_computed_as_first_time(request: Request, start: int, count: int) -> None:
        if start >= request.num_prompt_tokens:
            assert count == 1
        else:
            assert start + count <= request.num_prompt_tokens

    def abort_one(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id, self.now)
        assert request.status is RequestStatus.FINISHED_ABORTED
        self.ended.add(request_id)


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("HEADWAY_EXAMPLES", "200")),
    stateful_step_count=50,
    deadline=None,
    phases=[Phase.generate] if os.environ.get("HEADWAY_NOSHRINK") else list(Phase),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSchedulerMachine = SchedulerMachine.TestCase
