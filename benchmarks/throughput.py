"""How many tokens a second the whole engine makes, and what of a step is not the kernels'.

Real requests go through ``Engine.step``. Prefill: one prompt of 512 tokens at a time. Decode:
steps in which every request of the batch computes one token, at contexts around 128 tokens.

The targets were set on a processor with AVX-512 BF16. The machine is shared, so every figure is
the median of several runs, and the runs of all figures take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import machine

from headway.core.request import Request, SamplingParams
from headway.engine.client import StepReport
from headway.engine.config import EngineConfig
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput
from headway.executor import native
from headway.executor.execution import Execution
from headway.executor.precision import PRECISIONS
from headway.executor.readout import Readout

PREFILL_TOKENS = 512
CONTEXT = 128
DECODE_STEPS = 24

#: Tokens a second.
TARGETS = {
    "prefill 512": 2400,
    "decode 1": 110,
    "decode 8": 550,
    "decode 16": 850,
    "decode 64": 1350,
}
#: What the engine adds to the kernels' time: to a step of one request (ms), and of a step at the
#: largest batch.
MAX_OVERHEAD_MS = 0.4
MAX_OVERHEAD = 0.05


class Bench:
    """An engine whose parts are timed; there can be no other in the process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.random = random.Random(0)
        self.count = 0
        #: Seconds in each part of the current step.
        self.parts: dict[str, float] = defaultdict(float)
        #: Steps since ``run`` began, with their parts.
        self.steps: list[tuple[StepReport, dict[str, float]]] = []
        for owner, method, part in (  # they do not overlap
            (engine.scheduler, "schedule", "schedule"),
            (native, "build_batch", "build batch"),
            (Execution, "advance", "kernels"),
            (Readout, "read", "read out"),
            (engine, "_learn", "cost model"),
            (engine.scheduler, "update_from_output", "update"),
            (engine, "_advance", "detokenise"),
        ):
            self._time(owner, method, part)
        engine.listeners.append(self._listen)

    def _time(self, owner: Any, method: str, part: str) -> None:
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.parts[part] += perf_counter() - start

        setattr(owner, method, timed)

    def _listen(self, step: StepReport, _: Sequence[EngineOutput]) -> None:
        self.steps.append((step, dict(self.parts)))
        self.parts.clear()

    def prompt(self, length: int) -> list[int]:
        assert self.engine.tokenizer is not None
        return [self.random.randrange(100, self.engine.tokenizer.vocab_size) for _ in range(length)]

    def run(self, prompts: Iterable[list[int]], max_tokens: int) -> None:
        """Submit the prompts at once and step until they are done."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.steps.clear()
        for prompt in prompts:
            self.count += 1
            request = Request(f"{self.count}", prompt=prompt, sampling_params=params)
            self.engine.submit(request)
        while self.engine.has_work:
            self.engine.step()

    def prefill(self) -> float:
        """Tokens a second, from the first step's begin until the first token is out."""
        self.run([self.prompt(PREFILL_TOKENS)], max_tokens=1)
        return PREFILL_TOKENS / (self.steps[-1][0].end - self.steps[0][0].start)

    def decode(self, prompts: list[list[int]]) -> dict[str, float]:
        """Tokens a second in steady state, and milliseconds a step by part (medians)."""
        batch = len(prompts)
        self.run(prompts, max_tokens=DECODE_STEPS + batch)  # the first ones start earlier
        rows: dict[str, list[float]] = defaultdict(list)
        contexts: list[int] = []
        overheads: list[float] = []
        end: float | None = None
        for step, parts in self.steps:
            is_steady = len(step.output) == batch == step.output.num_batched_tokens
            if is_steady and end is not None and len(contexts) < DECODE_STEPS:
                contexts.append(step.output.features.context_tokens // batch)
                rows["step"].append(step.end - end)  # from end to end: nothing is left out
                overheads.append(step.end - end - parts["kernels"])
                rows["between steps"].append(step.start - end)
                for part, seconds in parts.items():
                    rows[part].append(seconds)
                execute = step.execute_end - step.execute_start
                inside = parts["build batch"] + parts["kernels"] + parts["read out"]
                rows["rest of execute"].append(execute - inside)
            end = step.end
        result = {name: 1e3 * statistics.median(values) for name, values in rows.items()}
        result["other"] = 2 * result["step"] - sum(result.values())
        return {
            "tokens_per_s": batch * 1e3 / result["step"],
            "overhead": 1 - result["kernels"] / result["step"],
            "overhead ms": 1e3 * statistics.median(overheads),
            "context": statistics.mean(contexts),
            **{f"{name} ms": value for name, value in result.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each, in turn; medians count")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--precision", choices=PRECISIONS, default="int8", help="of activations")
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")
    arguments = parser.parse_args()
    largest = max(arguments.batches)
    engine = EngineConfig(max_num_seqs=largest, precision=arguments.precision).build()
    kernels = engine.description.facts["kernels"]
    bench = Bench(engine)
    # The same prompts in every run: all but the first find theirs in the prefix cache, so that
    # they prefill little and their contexts are alike.
    prompts = [bench.prompt(CONTEXT - DECODE_STEPS // 2) for _ in range(largest)]
    bench.run(prompts, max_tokens=2)
    prefills: list[float] = []
    decodes: dict[int, list[dict[str, float]]] = {batch: [] for batch in arguments.batches}
    for _ in range(arguments.runs):
        prefills.append(bench.prefill())
        for batch in arguments.batches:
            decodes[batch].append(bench.decode(prompts[:batch]))
    engine.close()

    results: dict[str, Any] = {"kernels": kernels}
    results[f"prefill {PREFILL_TOKENS}"] = machine.summary(prefills)
    for batch, runs in decodes.items():
        results[f"decode {batch}"] = machine.summary([figures["tokens_per_s"] for figures in runs])
    for batch, runs in decodes.items():
        results[f"step at batch {batch}"] = {
            name: machine.summary([figures[name] for figures in runs])
            for name in runs[0]
            if name != "tokens_per_s"
        }
    results["targets"] = TARGETS | {
        "overhead": MAX_OVERHEAD,
        "overhead ms at batch 1": MAX_OVERHEAD_MS,
    }
    path = machine.write("throughput", results)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        return
    about = machine.describe()
    print(f"{about['processor']}, {about['cores']} cores; {kernels}")
    print(f"{'tokens/s':<16} {'median':>8} {'best':>8} {'target':>8}   (targets: AVX-512 BF16)")
    for name in (name for name in results if name.startswith(("prefill", "decode"))):
        rate = results[name]
        print(f"{name:<16} {rate['median']:8.0f} {rate['max']:8.0f} {TARGETS.get(name, '–'):>8}")
    for batch in sorted({arguments.batches[0], largest}):
        found = results[f"step at batch {batch}"]
        step = {name: value["median"] for name, value in found.items()}
        print(
            f"a step at batch {batch}: {step['step ms']:.1f} ms, of which not the kernels' "
            f"{step['overhead ms']:.2f} ms = {100 * step['overhead']:.1f} % (targets: "
            f"{MAX_OVERHEAD_MS} ms at batch 1, {100 * MAX_OVERHEAD:.0f} % at batch 64)"
        )
        for name, value in step.items():
            if name.endswith(" ms") and name not in ("step ms", "overhead ms"):
                print(f"  {name.removesuffix(' ms'):<16} {value:8.3f} ms")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
