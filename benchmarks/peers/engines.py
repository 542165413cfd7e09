"""The engines that ``peers.py`` measures: where each is, what it reads, how it is run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from pathlib import Path
from typing import NamedTuple

import machine
from clients_tokenizer import write_tokenizer
from vllm_plugin_server import VLLM

ROOT = Path(__file__).resolve().parent.parent.parent
_HERE = ROOT / "benchmarks" / "peers"
_VLLM = ROOT / ".venv-vllm"
_LLAMA_CPP = ROOT / ".venv-llama-cpp"
#: The server, and the library beside it.
_LLAMA_CPP_BIN = _LLAMA_CPP / "llama.cpp" / "bin"
_OPENVINO_GENAI = ROOT / ".venv-openvino-genai"

#: Of a request in ``urgent_under_load.py``: 200 words in, 256 tokens out.
_MAX_MODEL_LEN = 512


class Engine(NamedTuple):
    """An engine, in an environment of its own.

    Attributes:
        environment: the virtual environment.
        stamp: in it, a file that is there once all is installed; None if it need not be checked.
        script: that measures speed.
        converter: from the GGUF file and a directory for what is converted, the arguments of a
            Python that prints the path of the model as the engine reads it; None if that is the
            GGUF file.
        variables: of its processes.
        serve: a server's command for a model and a number of sequences at a time.
    """

    environment: Path
    stamp: str | None
    script: Path
    converter: Callable[[Path, Path], list[str]] | None
    variables: Callable[[], Mapping[str, str]]
    serve: Callable[[Path, int], str]

    @property
    def python(self) -> str:
        return str(self.environment / "bin" / "python")

    @property
    def is_installed(self) -> bool:
        return self.stamp is None or (self.environment / self.stamp).exists()

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"make {self.environment.name}/{self.stamp}"


def _no_variables() -> Mapping[str, str]:
    return {}


def _converter(script: str) -> Callable[[Path, Path], list[str]]:
    return lambda gguf, directory: [str(_HERE / script), str(gguf), str(directory)]


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))


# --- Headway --------------------------------------------------------------------------------------


def _serve_headway(model: Path, slots: int) -> str:
    return f"headway serve --port {{port}} --max-num-seqs {slots}"


# --- vLLM -----------------------------------------------------------------------------------------


def _vllm_variables() -> Mapping[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": _vllm_cores(),
        "VLLM_DTYPE": _vllm_dtype(),  # for run_vllm.py
        "LD_PRELOAD": ":".join(_vllm_preload()),
    }


def _vllm_dtype() -> str:
    """Without AVX-512 its bfloat16 is an emulation, many times slower than float32."""
    return "bfloat16" if "avx512f" in machine.describe()["isa"] else "float32"


def _vllm_cores() -> str:
    """All of them: by itself it would leave one to the process that answers HTTP."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def _vllm_preload() -> list[str]:
    """The allocator and the OpenMP that it recommends, as far as they are installed."""
    allocator = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    openmp = _VLLM / "lib" / "libiomp5.so"
    return [allocator] * (allocator is not None) + [str(openmp)] * openmp.exists()


def _serve_vllm(model: Path, slots: int) -> str:
    vllm = VLLM(_VLLM / "bin" / "python", model, eager=False)
    command = vllm.serve(slots, "--dtype", _vllm_dtype(), headway=None)
    return f"env VLLM_CPU_OMP_THREADS_BIND={_vllm_cores()} {command}"


# --- llama.cpp ------------------------------------------------------------------------------------


def _serve_llama_cpp(model: Path, slots: int) -> str:
    threads = str(_num_threads())
    command = [
        str(_LLAMA_CPP_BIN / "llama-server"),
        *("--model", str(model), "--host", "127.0.0.1"),
        *("--threads", threads, "--threads-batch", threads, "--flash-attn", "on"),
        *("--parallel", str(slots), "--ctx-size", str(slots * _MAX_MODEL_LEN)),
        # Every prompt is another: nothing to gain from keeping old ones.
        *("--cache-ram", "0"),
    ]
    return shlex.join(command) + " --port {port}"


# --- OpenVINO GenAI -------------------------------------------------------------------------------


def _serve_openvino_genai(model: Path, slots: int) -> str:
    python = _OPENVINO_GENAI / "bin" / "python"
    script = _HERE / "serve_openvino_genai.py"
    tokenizer = model.with_suffix(".tokenizer")
    if not tokenizer.exists():
        write_tokenizer(model, tokenizer)
    arguments = [str(python), str(script), str(model), str(tokenizer), "--slots", str(slots)]
    return shlex.join(arguments) + " --port {port}"


HEADWAY = "Headway"
ENGINES: Mapping[str, Engine] = {
    HEADWAY: Engine(
        Path(sys.prefix), None, _HERE / "run_headway.py", None, _no_variables, _serve_headway
    ),
    "vLLM-CPU": Engine(
        _VLLM,
        "peers-stamp",
        _HERE / "run_vllm.py",
        lambda gguf, directory: [str(ROOT / "tests_vllm" / "convert_model.py")],
        _vllm_variables,
        _serve_vllm,
    ),
    "llama.cpp": Engine(
        _LLAMA_CPP,
        "stamp",
        _HERE / "run_llama_cpp.py",
        _converter("convert_llama_cpp.py"),
        lambda: {"LLAMA_CPP_LIB_PATH": str(_LLAMA_CPP_BIN)},
        _serve_llama_cpp,
    ),
    "OpenVINO GenAI": Engine(
        _OPENVINO_GENAI,
        "stamp",
        _HERE / "run_openvino_genai.py",
        _converter("convert_openvino_genai.py"),
        _no_variables,
        _serve_openvino_genai,
    ),
}
