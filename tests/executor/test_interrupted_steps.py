"""Steps that are suspended between two layers, or discarded, while requests come and yield.

Few slots and a small pool make requests yield in every way that the scheduler knows, and chance
interrupts the steps. A request's output must be what it is where nothing of this happens: its
tokens, and the probabilities that the model gave them, to the last bit.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_models import TinyModel

from headway.core import invariants
from headway.core.config import SchedulerConfig
from headway.core.request import Request, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.engine.engine import Engine
from headway.engine.llm import LLM
from headway.engine.outputs import RequestOutput
from headway.executor.base import ModelRunnerOutput, PromptLogprobs, TokenLogprobs
from headway.executor.execution import Execution
from headway.executor.native import NativeExecutor
from headway.executor.precision import PRECISIONS, Precision
from headway.kernels.loader import available_paths
from headway.models.registry import default_home

#: Preemption mode → the way to yield that some request must have taken in it.
MODES = {
    "pause": "pause",
    "tail": "tail",
    "swap": "swap",
    "recompute": "recompute",
    "auto": "swap",
}

#: In each of the five modes and two precisions: 200 on each path of the kernels.
NUM_REQUESTS = 20

#: The tiny model's outputs come upon them now and then.
END_TOKENS = frozenset({3, 4})

#: Several times what a run needs.
MAX_STEPS = 5000


class Asked(NamedTuple):
    """What a client asks: a request can be made of it for each scheduler."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    n: int
    priority: int

    def request(self) -> Request:
        return Request(
            self.request_id, self.priority, self.prompt, sampling_params=self.params, n=self.n
        )


class Choice(NamedTuple):
    """What a client gets of a choice."""

    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs]


class Answer(NamedTuple):
    """What a client gets."""

    choices: list[Choice]
    prompt_logprobs: list[TokenLogprobs]


def make_asked(mode: str, count: int, vocab_size: int, most_tokens: int = 30) -> list[Asked]:
    """Greedy and sampled requests, groups, and prompts that begin alike."""
    chance = random.Random(mode)

    def tokens(least: int, most: int) -> list[int]:
        return [chance.randrange(vocab_size) for _ in range(chance.randint(least, most))]

    preamble = tokens(70, 70)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 0, "min_tokens": 8},
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
        {"temperature": 1.2, "presence_penalty": 0.7, "logprobs": 0, "prompt_logprobs": 1},
    ]
    asked = []
    for index in range(count):
        prompt = preamble + tokens(1, 30) if index % 3 == 0 else tokens(1, 100)
        kind = kinds[index % len(kinds)]
        params = SamplingParams(max_tokens=chance.randint(8, most_tokens), seed=index, **kind)
        n = (1, 1, 3, 1, 2)[index % 5]
        asked.append(Asked(f"{mode} {index}", prompt, params, n, chance.randrange(4)))
    return asked


def undisturbed(executor: NativeExecutor, asked: Sequence[Asked]) -> dict[str, Answer]:
    """What each request gets alone, in an engine that has room for it and runs whole steps."""
    config = SchedulerConfig(
        num_blocks=executor.num_blocks,
        block_size=executor.block_size,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        eos_token_ids=END_TOKENS,
    )
    engine = Engine(executor, PriorityScheduler(config=config))
    answers = {}
    for each in asked:
        request = each.request()
        told = RequestOutput.of(request)
        engine.submit(request)
        while engine.has_work:
            for output in engine.step():
                told.extend(output)
        answers[each.request_id] = Answer(
            [
                Choice(choice.token_ids, choice.finish_reason, choice.logprobs or [])
                for choice in told.outputs
            ],
            [rated for rated in told.prompt_logprobs or [] if rated is not None],
        )
    assert sum(engine.statistics.preemptions.values()) == 0
    return answers


def has_moves(output: SchedulerOutput) -> bool:
    """Whether a step copies blocks."""
    return bool(output.swap_out or output.block_copies or output.swap_in)


@dataclass
class Part:
    """Rows of a step that are computed together.

    Attributes:
        indices: of the rows in the step.
        execution: None until it is begun, and when it has been discarded.
        has_moved: whether the step's block moves were done with it.
    """

    indices: list[int]
    execution: Execution | None = None
    has_moved: bool = False

    @property
    def is_complete(self) -> bool:
        return self.execution is not None and self.execution.is_complete


class Interrupter:
    """Computes steps with interruptions, and counts them.

    A step becomes one or more executions, each of whole requests: none writes to a block that
    another reads. They take turns by chance, some stages at a time, and now and then what has been
    computed of one is discarded, and it is begun anew.

    Args:
        executor: that computes.
        chance: decides who goes on, how far, and what is discarded.
        stopping: a thread that stops executions, too, while they run; None for no such thread.
    """

    def __init__(
        self,
        executor: NativeExecutor,
        chance: random.Random,
        stopping: ThreadPoolExecutor | None = None,
    ) -> None:
        self._executor, self._chance, self._stopping = executor, chance, stopping
        #: The execution that has computed a stage last.
        self._last: Execution | None = None
        #: Times that an execution went on after it was suspended between two stages.
        self.num_suspended = 0
        #: Of these, those when another had run meanwhile.
        self.num_overtaken = 0
        #: Times that computed stages were discarded.
        self.num_discarded = 0
        #: Times that block moves had been done with what was discarded, and were not done again.
        self.num_kept_moves = 0

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Compute a step to its end."""
        parts = self._parts(output.rows)
        moves = output  # the block moves that are left to do: each must be done once
        while unfinished := [part for part in parts if not part.is_complete]:
            part = self._chance.choice(unfinished)
            if part.execution is None:
                part.execution = self._begin(moves, [output[index] for index in part.indices])
                part.has_moved = part.has_moved or has_moves(moves)
                moves = SchedulerOutput()
            if not part.execution.is_complete:
                self._advance(part.execution)
            if part.execution.stage and self._chance.random() < 0.1:
                self.num_discarded += 1
                self.num_kept_moves += part.has_moved
                part.execution = None
        return self._merged(parts, len(output))

    def drop(self, output: SchedulerOutput) -> None:
        """Do a step's block moves, compute some of its stages or none, and discard it."""
        execution = self._begin(output, output.rows)
        self.num_kept_moves += has_moves(output)
        num_stages = self._chance.randint(0, execution.num_stages)
        if num_stages:
            execution.advance(num_stages)
            self.num_discarded += 1

    def _parts(self, rows: Sequence[StepRow]) -> list[Part]:
        """Up to three parts of whole requests; of a step without rows, one that has none."""
        request_ids = list(dict.fromkeys(row.request_id for row in rows))
        num_parts = self._chance.choice([1, 1, 2, 3])
        homes = {request_id: self._chance.randrange(num_parts) for request_id in request_ids}
        indices: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            indices[homes[row.request_id]].append(index)
        return [Part(each) for each in indices.values()] or [Part([])]

    def _begin(self, moves: SchedulerOutput, rows: Sequence[StepRow]) -> Execution:
        return self._executor.begin(
            SchedulerOutput(
                rows=rows,
                swap_out=moves.swap_out,
                block_copies=moves.block_copies,
                swap_in=moves.swap_in,
            )
        )

    def _advance(self, execution: Execution) -> None:
        """Let an execution compute one stage or more, and perhaps all that are left."""
        stage = execution.stage
        if stage:
            self.num_suspended += 1
            self.num_overtaken += execution is not self._last
        self._last = execution
        way = self._chance.choice(["until", "until", "stop", "thread"])
        if way == "stop":
            execution.stop()
            execution.advance()
            assert execution.stage == stage + 1
        elif way == "thread" and self._stopping is not None:
            stopped = self._stopping.submit(execution.stop)
            execution.advance()
            stopped.result()
            assert execution.stage > stage
        else:
            until = self._chance.randint(stage + 1, execution.num_stages)
            execution.advance(until)
            assert execution.stage == until

    def _merged(self, parts: Sequence[Part], num_rows: int) -> ModelRunnerOutput:
        tokens: list[tuple[int, ...]] = [()] * num_rows
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        for part in parts:
            assert part.execution is not None
            output = part.execution.output()
            assert not output.errors
            for place, index in enumerate(part.indices):
                tokens[index] = output.tokens[place]
                if place in output.logprobs:
                    logprobs[index] = output.logprobs[place]
                if place in output.prompt_logprobs:
                    prompt_logprobs[index] = output.prompt_logprobs[place]
        return ModelRunnerOutput(tokens, 0.0, logprobs, prompt_logprobs)


class Run:
    """Serves requests that come while others run; the invariants hold after every step.

    Args:
        asked: in order of their arrival.
        scheduler: that has no requests yet.
        interrupter: computes its steps.
        chance: decides when requests come, change their rank, and steps are dropped.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        scheduler: PriorityScheduler,
        interrupter: Interrupter,
        chance: random.Random,
    ) -> None:
        self._scheduler, self._interrupter, self._chance = scheduler, interrupter, chance
        self.requests = [each.request() for each in asked]
        self._num_arrived = 0
        self._logprobs: dict[tuple[str, int], list[TokenLogprobs]] = defaultdict(list)
        self._prompt_logprobs: dict[str, list[TokenLogprobs]] = defaultdict(list)
        #: Steps that were discarded for good: another was scheduled instead.
        self.num_dropped = 0

    def serve(self) -> dict[str, Answer]:
        """What each of the requests gets."""
        for _ in range(MAX_STEPS):
            if not self._are_more_to_come and not self._scheduler.requests:
                return {request.request_id: self._answer(request) for request in self.requests}
            self._step()
        raise AssertionError(f"unfinished: {self._scheduler.requests}")

    @property
    def _are_more_to_come(self) -> bool:
        return self._num_arrived < len(self.requests)

    def _step(self) -> None:
        output = self._schedule()
        while output and self._chance.random() < (0.5 if has_moves(output) else 0.15):
            self._interrupter.drop(output)
            self.num_dropped += 1
            output = self._schedule()
        result = self._interrupter.compute(output)
        for index, rated in result.logprobs.items():
            row = output[index]
            for place, token in enumerate(rated):  # with several seeds, one of each choice
                choice = row.index + (place if len(row.seeds) > 1 else 0)
                self._logprobs[row.request_id, choice].append(token)
        for index, stretch in result.prompt_logprobs.items():
            told = self._prompt_logprobs[output[index].request_id]
            assert stretch.start == 1 + len(told)
            told += stretch.tokens
        self._scheduler.update_from_output(output, result.tokens)
        invariants.check(self._scheduler)

    def _schedule(self) -> SchedulerOutput:
        """The next step, after requests may have come and a rank may have changed."""
        chance, scheduler = self._chance, self._scheduler
        while self._are_more_to_come and len(scheduler.requests) < 6 and chance.random() < 0.3:
            scheduler.add_request(self.requests[self._num_arrived])
            self._num_arrived += 1
        # Ranks that changed to the end might keep requests from ever getting there.
        if scheduler.requests and self._are_more_to_come and chance.random() < 0.1:
            scheduler.set_priority(chance.choice(list(scheduler.requests)), chance.randrange(4))
        output = scheduler.schedule()
        invariants.check_output(scheduler, output)
        return output

    def _answer(self, request: Request) -> Answer:
        choices = []
        for sequence in request.sequences:
            assert sequence.finish_status is not None
            choices.append(
                Choice(
                    sequence.output_token_ids,
                    sequence.finish_status.finish_reason,
                    self._logprobs[request.request_id, sequence.index],
                )
            )
        return Answer(choices, self._prompt_logprobs[request.request_id])


def check_run(
    executor: NativeExecutor,
    asked: Sequence[Asked],
    expected: Mapping[str, Answer],
    mode: str,
    stopping: ThreadPoolExecutor | None = None,
) -> None:
    """Serve requests in a pool that holds two or three of them, and interrupt their steps."""
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=37,
        num_blocks=9,
        block_size=executor.block_size,
        num_swap_blocks=7,
        preemption_mode=mode,
        eos_token_ids=END_TOKENS,
    )
    scheduler = PriorityScheduler(config=config)
    # Two sources of chance: where a thread stops a step must not change who yields to whom.
    interrupter = Interrupter(executor, random.Random(1), stopping)
    run = Run(asked, scheduler, interrupter, random.Random(2))
    answers = run.serve()
    assert answers.keys() == expected.keys()
    for request_id, answer in answers.items():
        assert answer == expected[request_id], request_id
    # All that might have made a difference has happened.
    statistics = scheduler.statistics()
    assert statistics.num_finished == len(asked)
    assert statistics.preemptions["pause"] > 0
    assert statistics.preemptions[MODES[mode]] > 0
    if mode in ("tail", "recompute"):
        assert scheduler.num_recomputed_tokens > 0
    assert sum(request.num_cached_tokens for request in run.requests) > 0
    assert run.num_dropped > 0
    assert interrupter.num_suspended > interrupter.num_overtaken > 0
    assert interrupter.num_discarded > 0
    assert interrupter.num_kept_moves > 0


# --- tiny, on each path ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for models, with one, and with the kernels that have been compiled already."""
    home = tmp_path_factory.mktemp("home")
    kernels = default_home() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(kernels, target_is_directory=True)
    TinyModel(num_layers=4).write(home / "m.gguf")
    return home


@pytest.fixture(scope="module", params=available_paths())
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PRECISIONS)
def executor(request: pytest.FixtureRequest, path: str, home: Path) -> Iterator[NativeExecutor]:
    precision: Precision = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_KERNELS", path)
        executor = NativeExecutor(
            home / "m.gguf",
            kv_cache_bytes=1 << 20,
            swap_space_bytes=1 << 20,
            max_num_batched_tokens=64,
            num_threads=1,
            precision=precision,
            home=home,
        )
    assert executor.kernels.path == path
    yield executor
    executor.close()


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_the_undisturbed_ones(executor: NativeExecutor, mode: str) -> None:
    asked = make_asked(mode, NUM_REQUESTS, executor.vocab_size)
    check_run(executor, asked, undisturbed(executor, asked), mode)


# --- with a model ---------------------------------------------------------------------------------


@pytest.mark.model
def test_outputs_of_the_real_model_are_the_undisturbed_ones(llm: LLM) -> None:
    """Another thread stops steps, too."""
    executor = llm.engine.executor
    assert isinstance(executor, NativeExecutor)
    llm.engine.scheduler.block_manager.reset_prefix_cache()  # another writes into its pool
    asked = make_asked("auto", 12, executor.vocab_size, most_tokens=10)
    with ThreadPoolExecutor(1) as stopping:
        check_run(executor, asked, undisturbed(executor, asked), "auto", stopping)
