"""What preemption costs, and that it changes no output.

1. Resuming: a request that sat out for an urgent one goes on with the next step, and computes
   nothing twice.
2. Swapping a request of 1,000 tokens out and in, against computing it again.
3. Determinism: the greedy output of requests that are paused, swapped or recomputed several times,
   beside changing neighbours and prefill chunks, token for token against their output alone.

Exits with status 1 if a figure misses its target.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import machine
import native_steps

from headway.core.config import SchedulerConfig
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.engine.client import StepReport
from headway.engine.config import EngineConfig
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.engine.tokenizer import Tokenizer
from headway.executor.native import NativeExecutor
from headway.models.registry import resolve

SWAPPED_TOKENS = 1_000
#: Swapping out and in over recomputing, at most.
MAX_SWAP_RATIO = 1 / 5
#: Steps from the urgent request's last to the victim's next, at most.
MAX_RESUME_STEPS = 1

URGENT, NORMAL, DEMOTED = -1, 1, 2
#: How often each request is made to yield: 1 … this.
MAX_DISTURBANCES = 5
YIELDED = {RequestStatus.PAUSED, RequestStatus.SWAPPED, RequestStatus.PREEMPTED}


class Way(NamedTuple):
    """A way to run the requests: how many at once, in a pool of which size, who yields how."""

    name: str
    mode: str
    max_num_seqs: int
    max_num_batched_tokens: int
    #: None = all of the executor's.
    num_blocks: int | None = None
    is_disturbed: bool = True


ALONE = Way("alone", "none", 1, 256, is_disturbed=False)
#: Odd budgets, so that chunks begin anywhere in a block; pools that do not hold all requests.
WAYS = (
    Way("in a batch", "none", 16, 256, is_disturbed=False),
    Way("pause", "pause", 8, 101),
    Way("swap", "swap", 16, 61, num_blocks=28),
    Way("tail", "tail", 16, 77, num_blocks=28),
    Way("auto", "auto", 16, 101, num_blocks=28),
    Way("recompute", "recompute", 16, 61, num_blocks=28),
)


class Witness:
    """A listener that keeps what an engine says of its requests.

    Attributes:
        steps: the ids of the requests in each step.
        token_ids: generated, by request id.
        statuses: where each request has been, by id, each status that differs from the last.
        metrics: of the requests that have ended, by id.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[set[str]] = []
        self.token_ids: dict[str, list[int]] = defaultdict(list)
        self.statuses: dict[str, list[RequestStatus]] = defaultdict(list)
        self.metrics: dict[str, RequestMetrics] = {}
        engine.listeners.append(self._listen)

    def _listen(self, step: StepReport, outputs: Sequence[EngineOutput]) -> None:
        self.steps.append({row.request_id for row in step.output})
        for change in step.changes:
            statuses = self.statuses[change.request_id]
            if statuses[-1:] != [change.status]:  # a new rank is a change, too
                statuses.append(change.status)
        for output in outputs:
            self.token_ids[output.request_id] += output.token_ids
            if output.is_last and output.metrics is not None:
                self.metrics[output.request_id] = output.metrics


# ---------------------------------------------------------------------------- resuming


def measure_resume(executor: NativeExecutor, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Urgent requests take the slots of decoding ones; how soon do those go on?"""
    num_seqs = 4
    engine = make_engine(executor, Way("resume", "auto", num_seqs, 256))
    witness = Witness(engine)
    resume_steps: list[int] = []
    for turn, prompt in enumerate(prompts):
        victims = [f"victim-{turn}-{index}" for index in range(num_seqs)]
        for index, victim in enumerate(victims):
            engine.submit(greedy(victim, prompt[index:], 24))
        while min(len(witness.token_ids[victim]) for victim in victims) < 4:
            engine.step()
        witness.steps.clear()
        urgent = f"urgent-{turn}"
        engine.submit(greedy(urgent, prompts[0][::-1], 6, URGENT))
        while engine.has_work:
            engine.step()
        end = max(index for index, ids in enumerate(witness.steps) if urgent in ids)
        for victim in victims:
            ran = [victim in ids for ids in witness.steps]
            if not all(ran[: end + 1]):  # it sat out
                resume_steps.append(ran.index(True, end + 1) - end)
    recomputed = sum(metrics.num_recomputed_tokens for metrics in witness.metrics.values())
    return {
        "resumed": len(resume_steps),
        "steps_until_next_token_max": max(resume_steps),
        "recomputed_tokens": recomputed,
        "met": max(resume_steps) <= MAX_RESUME_STEPS and not recomputed,
    }


# ---------------------------------------------------------------------------- swap or recompute


def measure_swap(executor: NativeExecutor, runs: int, chunk: int = 256) -> dict[str, Any]:
    """Milliseconds of a prefill, and of copying the same blocks out and in again."""
    num_blocks = -(-SWAPPED_TOKENS // executor.block_size)
    draw = random.Random(0)
    swaps: list[float] = []
    prefills: list[float] = []
    blocks = draw.sample(range(executor.num_blocks), 2 * num_blocks)
    slots = draw.sample(range(executor.num_swap_blocks), num_blocks)
    for _ in range(runs + 1):
        draw.shuffle(blocks)
        draw.shuffle(slots)
        prompt = [draw.randrange(100, executor.vocab_size) for _ in range(SWAPPED_TOKENS)]
        own, others = tuple(blocks[:num_blocks]), blocks[num_blocks:]
        start = perf_counter()
        for begin in range(0, SWAPPED_TOKENS, chunk):
            tokens = tuple(prompt[begin : begin + chunk])
            is_last = begin + len(tokens) == SWAPPED_TOKENS
            row = StepRow(
                "swapped",
                0,
                tokens,
                begin,
                own,
                SWAPPED_TOKENS,
                SamplingParams(temperature=0.0),
                seeds=(None,) if is_last else (),
                context=tuple(prompt[max(0, begin - 1) : begin]),
            )
            executor.execute(SchedulerOutput(rows=[row]))
        prefills.append(1e3 * (perf_counter() - start))
        leave = SchedulerOutput(swap_out=tuple(zip(own, slots, strict=True)))
        come_back = SchedulerOutput(swap_in=tuple(zip(slots, others, strict=True)))
        start = perf_counter()
        executor.execute(leave)
        executor.execute(come_back)
        swaps.append(1e3 * (perf_counter() - start))
    # In the first run, the system finds memory for the blocks and slots; it does so once.
    swap, prefill = machine.summary(swaps[1:]), machine.summary(prefills[1:])
    ratio = swap["median"] / prefill["median"]
    return {
        "tokens": SWAPPED_TOKENS,
        "swap_out_and_in_ms": swap,
        "first_swap_ms": round(swaps[0], 4),
        "recompute_ms": prefill,
        "ratio": round(ratio, 4),
        "met": ratio <= MAX_SWAP_RATIO,
    }


# ---------------------------------------------------------------------------- determinism


@dataclass
class Case:
    """One of the requests whose output must not change."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    #: Numbers of generated tokens at which it is made to yield.
    points: list[int]
    #: Its output alone.
    expected: list[int] = field(default_factory=list)


def make_cases(count: int, num_tokens: int, tokenizer: Tokenizer) -> list[Case]:
    """Varied prompts: 3 to 300 tokens of words and numbers; a third begin alike."""
    draw = random.Random(7)
    words = (__doc__ or "").split() + [str(n) for n in range(0, 1000, 37)]
    preface = tokenizer.encode("You are a helpful assistant. Answer in one sentence. " * 8)
    cases = []
    for index in range(count):
        length = int(3 * 100 ** draw.random())
        prompt = tokenizer.encode(" ".join(draw.choice(words) for _ in range(length)))[:length]
        if index % 3 == 0:
            prompt = preface + prompt
        max_tokens = draw.randint(num_tokens // 2, num_tokens)
        number = 1 + index % MAX_DISTURBANCES
        points = sorted(draw.sample(range(1, max_tokens - 3), number))
        cases.append(Case(f"case-{index}", prompt, max_tokens, points))
    return cases


class Driver:
    """Runs the cases and makes each yield at its points.

    A request is demoted; where no other waits for its slot or its blocks, urgent ones arrive. Once
    the request has yielded, it gets its rank back.
    """

    def __init__(self, engine: Engine, cases: Sequence[Case], is_disturbed: bool) -> None:
        self.engine = engine
        self.witness = Witness(engine)
        self.cases = cases
        self.is_disturbed = is_disturbed
        self.random = random.Random(1)
        #: The requests that have been demoted and have not yielded yet.
        self.demoted: set[str] = set()
        self.num_urgent = 0

    def run(self) -> Witness:
        for case in self.cases:
            self.engine.submit(greedy(case.request_id, case.prompt, case.max_tokens))
        due = [list(case.points) for case in self.cases]
        while self.engine.has_work:
            self.engine.step()
            if self.is_disturbed:
                for case, points in zip(self.cases, due, strict=True):
                    self._disturb(case.request_id, points)
        return self.witness

    def _disturb(self, request_id: str, points: list[int]) -> None:
        status = self.witness.statuses[request_id][-1]
        if status.is_finished:
            return
        if request_id in self.demoted:
            if status in YIELDED:
                self.demoted.remove(request_id)
                self.engine.set_priority(request_id, NORMAL)
        elif points and len(self.witness.token_ids[request_id]) >= points[0]:
            if status is RequestStatus.RUNNING:
                points.pop(0)
                self.demoted.add(request_id)
                self.engine.set_priority(request_id, DEMOTED)
                self._interrupt()
            elif status in YIELDED:
                points.pop(0)  # the interruption of another request has met it

    def _interrupt(self) -> None:
        """See to it that some request wants what the demoted one has."""
        description, now = self.engine.description, self.engine.statistics
        if now.num_waiting + now.num_paused + now.num_swapped + now.num_preempted:
            return
        num_available = round((1 - now.kv_cache_usage) * description.num_blocks)
        if num_available < 8:  # a request that needs a block more than there are
            self._submit_urgent((num_available + 1) * description.block_size)
        else:
            for _ in range(description.max_num_seqs - now.num_running + 1):
                self._submit_urgent(self.random.randint(2, 40))

    def _submit_urgent(self, length: int) -> None:
        self.num_urgent += 1
        prompt = [self.random.randrange(100, 40_000) for _ in range(length)]
        tokens = self.random.randint(1, 4)
        self.engine.submit(greedy(f"urgent-{self.num_urgent}", prompt, tokens, URGENT))


def run_alone(engine: Engine, cases: Sequence[Case]) -> None:
    """Find out what each case's output is when it has the engine to itself."""
    witness = Witness(engine)
    for case in cases:
        engine.submit(greedy(case.request_id, case.prompt, case.max_tokens))
        while engine.has_work:
            engine.step()
        engine.scheduler.block_manager.reset_prefix_cache()
        case.expected = witness.token_ids[case.request_id]


def measure_way(executor: NativeExecutor, way: Way, cases: Sequence[Case]) -> dict[str, Any]:
    """Run the cases this way and compare."""
    engine = make_engine(executor, way)
    start = perf_counter()
    witness = Driver(engine, cases, way.is_disturbed).run()
    seconds = perf_counter() - start
    times = []
    for case in cases:
        counts = Counter(witness.statuses[case.request_id])
        num_yields = sum(counts[status] for status in YIELDED)
        # A tail that was taken leaves no trace in the status.
        num_losses = witness.metrics[case.request_id].num_preemptions
        times.append(max(num_yields, counts[RequestStatus.PAUSED] + num_losses))
    mismatches = [
        describe_mismatch(executor, case, witness.token_ids[case.request_id])
        for case in cases
        if witness.token_ids[case.request_id] != case.expected
    ]
    return {
        "equal": len(cases) - len(mismatches),
        "of": len(cases),
        "disturbed": sum(count > 0 for count in times),
        "yields_per_request": f"{min(times)} … {max(times)}",
        "preemptions": engine.statistics.preemptions,
        "recomputed_tokens": sum(engine.statistics.recomputed_tokens.values()),
        "largest_batch": max(map(len, witness.steps)),
        "seconds": round(seconds, 1),
        "mismatches": mismatches,
        "met": not mismatches and (not way.is_disturbed or min(times) > 0),
    }


def describe_mismatch(executor: NativeExecutor, case: Case, got: list[int]) -> dict[str, Any]:
    """Where the outputs part, and how close the two tokens were. Overwrites the pool."""
    shorter = min(len(case.expected), len(got))
    parted = (at for at in range(shorter) if case.expected[at] != got[at])
    at = next(parted, shorter)
    report: dict[str, Any] = {
        "case": case.request_id,
        "prompt_tokens": len(case.prompt),
        "position": at,
    }
    if at < shorter:
        prompt = case.prompt + case.expected[:at]
        blocks = tuple(range(-(-len(prompt) // executor.block_size)))
        params = SamplingParams(temperature=1.0)
        row = StepRow("probe", 0, tuple(prompt), 0, blocks, len(prompt), params, seeds=(0,))
        logits = native_steps.compute(executor, [row]).logits
        wanted, found = case.expected[at], got[at]
        report |= {"expected": wanted, "got": found}
        report["logit_gap"] = round(float(logits[0, wanted] - logits[0, found]), 5)
    return report


# ---------------------------------------------------------------------------- shared


def greedy(request_id: str, prompt: list[int], max_tokens: int, priority: int = NORMAL) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id, priority, prompt, sampling_params=params)


def make_engine(executor: NativeExecutor, way: Way) -> Engine:
    """A fresh engine on ``executor``; no text is needed."""
    config = SchedulerConfig(
        max_num_seqs=way.max_num_seqs,
        max_num_batched_tokens=way.max_num_batched_tokens,
        num_blocks=way.num_blocks or executor.num_blocks,
        block_size=executor.block_size,
        num_swap_blocks=executor.num_swap_blocks,
        max_model_len=executor.max_model_len,
        preemption_mode=way.mode,
    )
    return Engine(executor, PriorityScheduler(config=config))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of swap and recompute, in turn")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48, help="generated by each, at most")
    parser.add_argument("--ways", nargs="+", default=[way.name for way in WAYS])
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    if arguments.tokens < 20:
        parser.error(f"--tokens is {arguments.tokens}, must be at least 20")
    path = resolve(EngineConfig().model)
    cases = make_cases(arguments.requests, arguments.tokens, Tokenizer(path))
    ways = [way for way in WAYS if way.name in arguments.ways]

    executor = NativeExecutor(path)
    results: dict[str, Any] = {"kernels": executor.describe()["kernels"]}
    results["swap"] = measure_swap(executor, arguments.runs)
    results["resume"] = measure_resume(executor, [(case.prompt * 20)[:60] for case in cases[:5]])
    run_alone(make_engine(executor, ALONE), cases)
    determinism = {way.name: measure_way(executor, way, cases) for way in ways}
    executor.close()
    results["determinism"] = determinism

    file = machine.write("preemption", results)
    parts = (results["swap"], results["resume"], *determinism.values())
    is_met = all(part["met"] for part in parts)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return not is_met
    swap, resume = results["swap"], results["resume"]
    print(f"kernels: {results['kernels']}")
    print(
        f"resume after pause: {resume['recomputed_tokens']} tokens recomputed (target 0), next "
        f"token in step {resume['steps_until_next_token_max']} (target {MAX_RESUME_STEPS}), "
        f"{resume['resumed']} resumed"
    )
    print(
        f"{SWAPPED_TOKENS} tokens swapped out and in: {swap['swap_out_and_in_ms']['median']:.1f} "
        f"ms, recomputed: {swap['recompute_ms']['median']:.0f} ms, ratio {swap['ratio']:.3f} "
        f"(target {MAX_SWAP_RATIO})"
    )
    for name, way in determinism.items():
        print(
            f"{name}: {way['equal']} of {way['of']} outputs equal; yields a request "
            f"{way['yields_per_request']}, {way['preemptions']}, {way['recomputed_tokens']} tokens "
            f"recomputed, batches to {way['largest_batch']}, {way['seconds']} s"
        )
        for mismatch in way["mismatches"]:
            print(f"  {mismatch}")
    print(f"written to {file}")
    return not is_met


if __name__ == "__main__":
    sys.exit(main())
