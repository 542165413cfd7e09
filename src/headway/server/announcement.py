"""What the operator reads once the server is up."""

from __future__ import annotations

import json
import math

from rich.console import Console

from headway import __version__
from headway.engine.client import EngineClient
from headway.server.config import ServerConfig
from headway.server.reach import TYPICAL_PROMPT, Reach, format_ms

__all__ = ["announce"]


def announce(engine: EngineClient, config: ServerConfig, url: str) -> None:
    """Say on standard error that requests are answered, where, and by which rules.

    Args:
        engine: its costs have been learnt.
        config: how it is served.
        url: where.
    """
    limits = engine.description
    step = f"at most {limits.max_num_seqs} requests and {limits.max_num_batched_tokens} tokens"
    if limits.step_limit_ms < math.inf:
        step += f", about {limits.step_limit_ms:g} ms"
    costs = engine.statistics.coefficients
    reach = Reach(costs, limits.max_num_batched_tokens, limits.max_step_ms)
    num_keys = len(config.api_keys)
    rows = {
        "model": ", ".join(config.served_model_names),
        "policy": f"{limits.scheduling_policy}, preemption {limits.preemption_mode}",
        "step": step,
        "targets": "  ".join(map(str, limits.slos)) or "none (--slo)",
        "reach": f"a first token within about {format_ms(reach.ttft_ms(limits.step_limit_ms))} for "
        f"an urgent prompt of {TYPICAL_PROMPT} tokens, {format_ms(reach.tpot_ms())} a token then",
        "contexts": f"of {limits.max_request_tokens:,} tokens; room for "
        f"{limits.num_blocks * limits.block_size:,} tokens in all",
        "access": "everybody who can connect"
        if num_keys == 0
        else f"with {num_keys} API key{'s' * (num_keys > 1)}",
    }
    if "results" in limits.facts:
        rows["results"] = limits.facts["results"]
    body = {"model": config.model_name, "prompt": "Queues form because", "priority": 0}
    header = "    -H 'Authorization: Bearer KEY' \\\n" if num_keys else ""
    terminal = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    terminal.print(f"Headway {__version__} answers at {url}/v1", style="bold")
    for name, text in rows.items():
        terminal.print(f"  {name:<10}{text}")
    for slo in limits.slos:
        for line in reach.beyond(slo):
            terminal.print(f"  target {line}")
    terminal.print(
        f"\n  curl {url}/v1/completions \\\n{header}"
        f"    -H 'Content-Type: application/json' \\\n    -d '{json.dumps(body)}'\n"
    )
