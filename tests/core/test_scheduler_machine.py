"""Random lives of a scheduler: whatever happens, in whatever order, the invariants hold.

And every request's output is what it would be if it were alone: the token at each place is a
function of request, choice and position, so that no order of events may change it.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from zlib import crc32

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.core import invariants
from headway.core.config import PreemptionMode, SchedulerConfig
from headway.core.life import TRANSITIONS, RequestStatus
from headway.core.request import Request, SamplingParams
from headway.core.request_table import StatusChange
from headway.core.sampling_params import choice_seed
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO

EOS = 7
#: A token that no sequence has: a draft that is always wrong.
WRONG = 9

#: What a slot of the pool holds: for whom, and the tokens up to and including its own.
Contents = tuple[bytes, tuple[int, ...]]


@dataclass
class Asked:
    """A request that was added, and what it would be without any other."""

    request: Request
    #: Of each choice, the prompt and every token up to its end.
    sequences: list[tuple[int, ...]]
    #: Choices that were ended from outside, or before it came here.
    cut_off: set[int]
    #: Positions of the prompt whose log-probabilities a step has told.
    rated: list[int]
    #: Whether it began elsewhere, which told them already.
    is_resumed: bool = False

    def banned_at(self, num_output_tokens: int) -> frozenset[int]:
        params = self.request.sampling_params
        return frozenset({EOS}) if num_output_tokens < params.min_tokens else frozenset()


def token_at(request_id: str, index: int, position: int, banned: frozenset[int]) -> int:
    """The token that a choice has at a position: 0 … 2, or once in nine the end token."""
    token = crc32(f"{request_id}/{index}/{position}".encode()) % 9
    return EOS if token == EOS and EOS not in banned else token % 3


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, resumes, schedules, drafts, stops, aborts, preempts and re-ranks in tiny pools.

    A model of the pool's contents runs along: for every block, which token at which position
    of which history it holds. It is what the executor would see, so it proves that every
    computed token of every sequence is where the sequence's block table says, and that no
    request finds what another tenant computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.now = 0.0
        self.asked: dict[str, Asked] = {}
        self.ended: set[str] = set()
        self.statuses: dict[str, RequestStatus] = {}
        #: Request id → positions that the step in flight tells the log-probabilities of.
        self.rated_now: dict[str, range] = {}

    @initialize(
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 24),
        num_blocks=st.integers(2, 14),
        block_size=st.sampled_from([1, 2, 4]),
        num_swap_blocks=st.sampled_from([0, 3, 20]),
        policy=st.sampled_from(["fcfs", "priority", "aging", "deadline"]),
        mode=st.sampled_from(list(PreemptionMode)),
        prefix_caching=st.booleans(),
        max_step_ms=st.sampled_from([None, None, 8.0]),
        slos=st.sampled_from(
            [
                (),
                (),
                (SLO(0, 30.0, 7.0), SLO(2, None, 9.0)),
                (SLO(0, 30.0), SLO(2, 60_000.0, 50.0)),
            ]
        ),
        share=st.sampled_from(["all", "all", "none", "9ms"]),
        prefill_share=st.sampled_from([1.0, 1.0, 0.25]),
        victim=st.sampled_from(["last", "cheapest"]),
        max_preemptions=st.sampled_from([None, 1, 3]),
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
        max_step_ms: float | None,
        slos: tuple[SLO, ...],
        share: str,
        prefill_share: float,
        victim: str,
        max_preemptions: int | None,
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
            max_step_ms=max_step_ms,
            slos=slos,
            sharing=SharingRules(share, prefill_share, victim, max_preemptions),
            eos_token_ids=frozenset({EOS}),
        )
        self.scheduler = PriorityScheduler(config=config)
        self.scheduler.table.on_change = self.note_change
        #: block, or swap slot → contents by offset.
        self.memory: dict[int, dict[int, Contents]] = {}
        self.swap: dict[int, dict[int, Contents]] = {}

    def note_change(self, change: StatusChange) -> None:
        before = self.statuses.get(change.request_id)
        assert before is None or change.status is before or change.status in TRANSITIONS[before]
        assert before is not None or change.status is RequestStatus.WAITING
        assert change.time == self.now or change.status is before
        self.statuses[change.request_id] = change.status

    # ------------------------------------------------------------------ requests in and out

    @rule(
        priority=st.integers(-2, 3),
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        min_tokens=st.sampled_from([0, 0, 2]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        deadline=st.none() | st.floats(0, 50),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        penalty=st.sampled_from([0.0, 0.0, 1.0]),
        temperature=st.sampled_from([0.0, 1.0]),
        tenant=st.sampled_from(["", "a", "b"]),
        cache_salt=st.sampled_from(["", "", "s"]),
        cache_group=st.sampled_from([None, None, "g"]),
        progress=st.lists(st.integers(0, 3), max_size=3),
    )
    def add(
        self,
        priority: int,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        n: int,
        deadline: float | None,
        prompt_logprobs: int | None,
        penalty: float,
        temperature: float,
        tenant: str,
        cache_salt: str,
        cache_group: str | None,
        progress: list[int],
    ) -> None:
        """Add a request; with ``progress`` its choices have so many tokens each, or have ended."""
        config = self.scheduler.config
        n = min(n, config.max_num_choices, config.num_blocks)
        # A group has a block for each choice's own tokens; so much of the prompt always fits.
        room = (config.num_blocks // n) * config.block_size - 1
        prompt = prompt[: max(1, room)]
        self.count += 1
        request_id = f"r{self.count}"
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            prompt_logprobs=prompt_logprobs,
            presence_penalty=penalty,
            temperature=temperature,
            seed=self.count,
        )
        others = {
            "n": n,
            "deadline": deadline,
            "tenant": tenant,
            "cache_salt": cache_salt,
            "cache_group": cache_group,
        }
        request = Request(request_id, priority, prompt, sampling_params=params, **others)
        limit = len(prompt) + max_tokens
        asked = Asked(request, [], set(), [])
        asked.sequences = [self.undisturbed(asked, index, limit) for index in range(n)]
        outputs = {}
        for index, count in enumerate(progress[:n]):
            output = asked.sequences[index][len(prompt) : -1]
            if count and output and len(prompt) + len(output) < room:
                outputs[index] = output[:count]
        if outputs:
            asked.is_resumed = True
            asked.cut_off.update(set(range(n)) - outputs.keys())
            asked.request = request = Request.resume(
                request_id, priority, prompt, outputs=outputs, sampling_params=params, **others
            )
        if not any(sequence.num_tokens > room for sequence in request.live) and room > 0:
            self.asked[request_id] = asked
            self.scheduler.add_request(request, self.now)
            asked.sequences = [each[: request.token_limit] for each in asked.sequences]

    def undisturbed(self, asked: Asked, index: int, limit: int) -> tuple[int, ...]:
        """A choice's tokens if nothing else happens."""
        tokens = asked.request.prompt_token_ids
        start = len(tokens)
        while len(tokens) < limit and (len(tokens) == start or tokens[-1] != EOS):
            banned = asked.banned_at(len(tokens) - start)
            tokens.append(token_at(asked.request.request_id, index, len(tokens), banned))
        return tuple(tokens)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.abort_request(data.draw(st.sampled_from(sorted(self.scheduler.requests))))

    @precondition(lambda self: any(request.n > 1 for request in self.scheduler.requests.values()))
    @rule(data=st.data())
    def stop_choice(self, data: st.DataObject) -> None:
        groups = [name for name, each in self.scheduler.requests.items() if each.n > 1]
        self.stop_one_choice(data, data.draw(st.sampled_from(sorted(groups))))

    @precondition(lambda self: self.scheduler.resident)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.scheduler.resident))
        self.scheduler.preempt(request.request_id, self.now)
        assert request.request_id in self.scheduler.waiting_heap

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), priority=st.integers(-3, 4))
    def set_priority(self, data: st.DataObject, priority: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.set_priority(request_id, priority)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), num_right=st.integers(0, 3), num_wrong=st.integers(0, 2))
    def propose(self, data: st.DataObject, num_right: int, num_wrong: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        sequence = data.draw(st.sampled_from(self.scheduler.requests[request_id].live))
        expected = self.asked[request_id].sequences[sequence.index]
        right = expected[sequence.num_tokens :][:num_right]
        self.scheduler.propose(request_id, sequence.index, (*right, *[WRONG] * num_wrong))

    # ------------------------------------------------------------------ steps

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), elapsed=st.floats(0, 5))
    def step(self, data: st.DataObject, elapsed: float) -> None:
        self.now += elapsed
        event = data.draw(st.sampled_from([None] * 6 + ["abort", "stop", "preempt"]))
        self.run_step(data, event)

    def run_step(self, data: st.DataObject | None = None, event: str | None = None) -> None:
        """Schedule, execute, take in; ``event`` happens while the executor is busy."""
        scheduler = self.scheduler
        output = scheduler.schedule(self.now)
        invariants.check_output(scheduler, output)
        output = pickle.loads(pickle.dumps(output))
        tokens = self.execute(output)
        if data is not None and event is not None:
            name = data.draw(st.sampled_from(sorted(scheduler.requests)))
            if event == "abort":
                self.abort_request(name)
            elif event == "stop":
                self.stop_one_choice(data, name)
            elif event == "preempt" and scheduler.requests[name] in scheduler.resident:
                scheduler.preempt(name, self.now)
                self.rated_now.pop(name, None)  # what it computed in this step is passed over
        for rated_name, stretch in self.rated_now.items():
            self.asked[rated_name].rated.extend(stretch)
        before = set(scheduler.requests)
        finished = scheduler.update_from_output(output, tokens, self.now)
        for request in finished:
            assert request.status in {
                RequestStatus.FINISHED_STOPPED,
                RequestStatus.FINISHED_LENGTH_CAPPED,
            }
        names = [request.request_id for request in finished]
        assert len(set(names)) == len(names)
        assert set(names) == before - set(scheduler.requests)
        self.ended.update(names)

    @invariant()
    def invariants_hold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        invariants.check(self.scheduler)
        assert self.asked.keys() - self.ended == set(self.scheduler.requests), "a request is lost"
        for name, asked in self.asked.items():
            assert self.statuses[name] is asked.request.status
            for sequence in asked.request.sequences:
                expected = asked.sequences[sequence.index]
                assert tuple(sequence.token_ids) == expected[: sequence.num_tokens]

    def teardown(self) -> None:
        """No request starves: without newcomers, all finish, and the pool is idle again."""
        if not hasattr(self, "scheduler"):
            return
        bound = 64 * (1 + len(self.scheduler.requests)) * 24
        for _ in range(bound):
            if not self.scheduler.requests:
                break
            self.run_step()
        assert self.asked.keys() == self.ended, "starved"
        self.invariants_hold()
        for asked in self.asked.values():
            self.assert_complete(asked)
        statistics = self.scheduler.statistics()
        assert statistics.blocks.held == 0
        assert statistics.num_swap_blocks_used == 0
        assert statistics.num_finished == len(self.asked)

    def assert_complete(self, asked: Asked) -> None:
        request = asked.request
        for sequence in request.sequences:
            assert sequence.is_finished
            if sequence.index in asked.cut_off:
                continue
            tokens = tuple(sequence.token_ids)
            assert tokens == asked.sequences[sequence.index]
            is_stop = tokens[-1] == EOS
            assert sequence.finish_status is (
                RequestStatus.FINISHED_STOPPED if is_stop else RequestStatus.FINISHED_LENGTH_CAPPED
            )
        if request.first_token_time is not None:
            is_rated = request.sampling_params.prompt_logprobs is not None
            is_new = not asked.is_resumed
            expected = range(1, request.num_prompt_tokens if is_rated and is_new else 1)
            assert asked.rated == list(expected)

    # ------------------------------------------------------------------ the pool's model

    def execute(self, output: SchedulerOutput) -> list[tuple[int, ...]]:
        self.swap.update({slot: dict(self.memory[block]) for block, slot in output.swap_out})
        for source, destination in output.block_copies:
            self.memory[destination] = dict(self.memory[source])
        for slot, block in output.swap_in:
            self.memory[block] = dict(self.swap[slot])
        self.rated_now.clear()
        return [self.compute(row) for row in output]

    def compute(self, row: StepRow) -> tuple[int, ...]:
        """Check what a row says against what its sequence is, and sample what it asks for."""
        asked = self.asked[row.request_id]
        request, known = asked.request, asked.sequences[row.index]
        size, start = self.scheduler.config.block_size, row.start
        end = start + len(row.token_ids)
        assert row.token_ids == known[start:end]
        assert (row.num_prompt_tokens, row.sampling) == (
            request.num_prompt_tokens,
            request.sampling_params,
        )
        if request.sampling_params.needs_history:
            assert row.context == known[:start]
        else:
            assert row.context in ((), known[max(0, start - 1) : start])
        for position in range(start):
            stored = self.memory[row.block_table[position // size]][position % size]
            assert stored == (request.cache_root, known[: position + 1]), "foreign contents"
        tokens = known[:end] + row.drafts
        for position in range(start, len(tokens)):
            block = self.memory.setdefault(row.block_table[position // size], {})
            block[position % size] = (request.cache_root, tokens[: position + 1])
        if row.rated is not None:
            stretch = range(row.rated.start, row.rated.start + len(row.rated.token_ids))
            assert row.rated.token_ids == known[stretch.start : stretch.stop]
            assert start < stretch.start and stretch.stop <= end + 1
            self.rated_now[row.request_id] = stretch
        return self.sample(asked, row, end)

    def sample(self, asked: Asked, row: StepRow, end: int) -> tuple[int, ...]:
        request, params = asked.request, asked.request.sampling_params
        assert not row.drafts or len(row.seeds) == 1
        if not row.seeds:
            return ()
        indices = [row.index] if len(row.seeds) == 1 else list(range(request.n))
        assert params.seed is not None
        assert list(row.seeds) == [choice_seed(params.seed, index) for index in indices]
        assert row.banned == asked.banned_at(end - row.num_prompt_tokens)

        def draw(index: int, position: int) -> int:
            banned = asked.banned_at(position - row.num_prompt_tokens)
            return token_at(row.request_id, index, position, banned)

        if len(indices) > 1:
            assert end == row.num_prompt_tokens
            return tuple(draw(index, end) for index in indices)
        tokens = [draw(row.index, end)]
        for draft in row.drafts:
            if draft != tokens[-1]:
                break
            tokens.append(draw(row.index, end + len(tokens)))
        return tuple(tokens)

    def abort_request(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id, self.now)
        assert request.status is RequestStatus.FINISHED_ABORTED
        self.asked[request_id].cut_off.update(range(request.n))
        self.ended.add(request_id)

    def stop_one_choice(self, data: st.DataObject, request_id: str) -> None:
        """As at a text that ends the output; the last choice's end is the request's."""
        live = self.scheduler.requests[request_id].live
        sequence = data.draw(st.sampled_from(live))
        is_last = len(live) == 1
        request = self.scheduler.stop_sequence(request_id, sequence.index, self.now)
        assert sequence.finish_status is RequestStatus.FINISHED_STOPPED
        self.asked[request_id].cut_off.add(sequence.index)
        assert request.is_finished is is_last
        if is_last:
            self.ended.add(request_id)


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("HEADWAY_EXAMPLES", "200")),
    stateful_step_count=50,
    deadline=None,
    phases=[Phase.generate] if os.environ.get("HEADWAY_NOSHRINK") else list(Phase),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSchedulerMachine = SchedulerMachine.TestCase
