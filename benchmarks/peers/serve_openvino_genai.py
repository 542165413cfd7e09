"""OpenVINO GenAI's continuous batching behind ``/v1/completions``: as little as a load needs.

The package has no server of its own. A thread makes the steps; what they give is handed to the
event loop once a step. Requests are served in the order they came: there are no priorities.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import queue
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import openvino_genai
from aiohttp import web
from run_openvino_genai import greedy, make_pipeline
from tokenizers import Tokenizer


class Job(NamedTuple):
    """A request; ``tokens`` gets its tokens, and None at the end."""

    prompt: list[int]
    max_tokens: int
    tokens: asyncio.Queue[int | None]


class Steps(threading.Thread):
    """Steps as long as there is work, and takes up new requests between two steps."""

    def __init__(self, pipeline: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self._pipeline = pipeline
        self._loop = loop
        self._arrived: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._running: list[tuple[Job, Any]] = []

    def submit(self, job: Job) -> None:
        """From any thread."""
        self._arrived.put(job)

    def run(self) -> None:
        while True:
            if not self._running:
                self._begin(self._arrived.get())
            while not self._arrived.empty():
                self._begin(self._arrived.get())
            self._pipeline.step()
            self._hand_out()

    def _begin(self, job: Job) -> None:
        tokens = ov.Tensor(np.array([job.prompt]))
        handle = self._pipeline.add_request(next(self._ids), tokens, greedy(job.max_tokens))
        self._running.append((job, handle))

    def _hand_out(self) -> None:
        given: list[tuple[Job, int | None]] = []
        for job, handle in self._running:
            while handle.can_read():
                (output,) = handle.read().values()
                given += [(job, token) for token in output.generated_ids]
        is_over = openvino_genai.GenerationStatus.FINISHED
        ended = [one for one in self._running if one[1].get_status() == is_over]
        self._running = [one for one in self._running if one not in ended]
        given += [(job, None) for job, _ in ended]
        if given:
            self._loop.call_soon_threadsafe(_put, given)


def _put(given: list[tuple[Job, int | None]]) -> None:
    for job, token in given:
        job.tokens.put_nowait(token)


class Handlers:
    def __init__(self, steps: Steps, tokenizer: Tokenizer, name: str) -> None:
        self._steps = steps
        self._tokenizer = tokenizer
        self._name = name

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self._name}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = self._tokenizer.encode(body["prompt"]).ids
        job = Job(prompt, body["max_tokens"], asyncio.Queue())
        self._steps.submit(job)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        count = 0
        while (token := await job.tokens.get()) is not None:
            count += 1
            text = self._tokenizer.decode([token])
            await _send(response, {"choices": [{"index": 0, "text": text}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def serve(model: Path, tokenizer: Path, slots: int, port: int) -> None:
    steps = Steps(make_pipeline(model, slots), asyncio.get_running_loop())
    handlers = Handlers(steps, Tokenizer.from_file(str(tokenizer / "tokenizer.json")), model.name)
    app = web.Application()
    app.router.add_get("/health", handlers.health)
    app.router.add_get("/v1/models", handlers.models)
    app.router.add_post("/v1/completions", handlers.completions)
    steps.start()
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokenizer", type=Path, help="directory of tokenizer.json")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.model, arguments.tokenizer, arguments.slots, arguments.port))
