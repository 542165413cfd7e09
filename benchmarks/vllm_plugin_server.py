"""vLLM on this machine's CPU as a command line, at its fastest, with and without the plug-in."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai_load import Client

#: Forced by vLLM on a CPU; elsewhere ``headway.vllm.HeadwayScheduler`` is the one to use.
SCHEDULER = "headway.vllm.HeadwaySyncScheduler"
#: The smallest that its attention on a CPU supports.
BLOCK_SIZE = 32

_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
_VERSIONS = """
import json, platform, torch, vllm
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__,
                  "python": platform.python_version()}))
"""
_PREEMPTIONS = re.compile(rb"^vllm:num_preemptions_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class VLLM:
    """An environment with vLLM, and a model for it.

    Attributes:
        python: of that environment.
        model: a Hugging Face directory.
        eager: start sooner, without compiling.
    """

    python: Path
    model: Path
    eager: bool

    def __post_init__(self) -> None:
        if not self.python.exists():
            raise SystemExit(
                f"no vLLM at {self.python}: run `make test-vllm` once, or name a --vllm-python"
            )
        if not (self.model / "config.json").exists():
            raise SystemExit(
                f"no model in {self.model}: run `make test-vllm` once, or name a --model-dir"
            )

    @property
    def preload(self) -> list[str]:
        """The allocator and the OpenMP that vLLM recommends, as far as they are installed."""
        found = [find_library("tcmalloc_minimal") or find_library("tcmalloc")]
        openmp = self.python.absolute().parent.parent / "lib" / "libiomp5.so"
        return [name for name in found if name] + [str(openmp)] * openmp.exists()

    def serve(self, max_num_seqs: int, *flags: str, headway: dict[str, Any] | None) -> str:
        """The command of a server, as ``openai_load.serve`` takes it.

        Args:
            headway: what the plug-in is told; None = plain vLLM.
        """
        arguments = ["--model", str(self.model), "--served-model-name", self.model.name]
        arguments += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "1024"]
        arguments += ["--scheduling-policy", "priority", "--max-num-seqs", str(max_num_seqs)]
        arguments += flags
        if self.eager:
            arguments.append("--enforce-eager")
        if headway is not None:
            arguments += ["--scheduler-cls", SCHEDULER]
        if headway:
            arguments += ["--additional-config", json.dumps({"headway": headway})]
        command = self._command("-m", "vllm.entrypoints.openai.api_server", *arguments)
        return shlex.join(command).replace("{", "{{").replace("}", "}}") + " --port {port}"

    def run(self, *arguments: str) -> Any:
        """What Python in that environment prints as JSON in its last line."""
        command = ["env", "VLLM_LOGGING_LEVEL=ERROR", *self._command(*arguments)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)!r} ended with status {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])

    def describe(self) -> dict[str, Any]:
        """Versions, and what else a figure depends on."""
        return {
            **self.run("-c", _VERSIONS),
            "preload": [Path(name).name for name in self.preload],
            "compiled": not self.eager,
            "model": self.model.name,
        }

    def _command(self, *arguments: str) -> list[str]:
        variables = _VARIABLES | ({"LD_PRELOAD": ":".join(self.preload)} if self.preload else {})
        settings = [f"{name}={value}" for name, value in variables.items()]
        return ["env", *settings, str(self.python), *arguments]


async def num_preemptions(client: Client) -> float:
    """Requests that lost their blocks since the server's start."""
    return sum(float(value) for value in _PREEMPTIONS.findall(await client.get("/metrics")))
