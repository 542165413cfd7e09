"""The command line: ``headway generate``, ``headway serve``, ``headway demo``, ``headway models``.

Results go to standard output, everything else to standard error, so output can be piped. Exit
status: 0 done, 2 refused (one line says why), 130 interrupted. A traceback means a bug.

What takes long to import (numpy, matplotlib) is imported by the command that needs it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from headway import __version__, console
from headway.core.errors import HeadwayError, InvalidRequest
from headway.core.priority import check_priority
from headway.core.sampling_params import SamplingParams
from headway.engine.config import EngineConfig
from headway.models.registry import DEFAULT_MODEL, list_models
from headway.options import ENGINE_OPTIONS, MODEL, PREEMPTION_MODE, settings_of, takes
from headway.server.command import EPILOG, serve

if TYPE_CHECKING:
    from headway.engine.llm import LLM
    from headway.engine.outputs import RequestOutput

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Turns the ways a command can end early into a line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that has gone is dealt with
            return result
        except HeadwayError as error:
            _quit(2, f"error: {error}")
        except KeyboardInterrupt:
            _quit(130, "stopped")
        except BrokenPipeError:
            # Whoever read the output has seen enough; the interpreter's last flush must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None  # 128 + SIGPIPE, as of any other tool


def _quit(status: int, line: str) -> NoReturn:
    print(f"headway: {line}", file=sys.stderr)
    raise typer.Exit(status)


app = typer.Typer(
    cls=_Commands,
    help=(
        "Headway runs language models on your computer, and the urgent request goes "
        "next: it overtakes batch work at once, and nothing is lost."
    ),
    epilog=("\b\nTry:\n  headway demo\n  headway generate 'Why is the sky blue?'\n  headway serve"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may say what the terminal cannot
    app(prog_name="headway")


_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"headway {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version."),
    ] = False,
) -> None:
    pass


@app.command(
    cls=console.TopicCommand,
    epilog="Example:  headway generate --max-tokens 64 'Why is the sky blue?'",
)
@takes(*ENGINE_OPTIONS, first=[MODEL])
def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to answer; - reads standard input.")
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Stop after so many.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; higher: more varied.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens with this total probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many likeliest; 0: all.")] = 0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.", show_default="random")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this text; may be given several times.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Answer the prompt as a chat, or continue it as plain text.",
            show_default="chat, if the model can",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Instructions that come before the chat.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Smaller is served first.")] = 0,
    as_json: _Json = False,
    **values: Any,
) -> None:
    """Answer one PROMPT; the text appears as it is generated."""
    # All that can be refused without a model is refused before one is loaded.
    text = _read_prompt(prompt)
    check_priority("prompt", priority)
    if system is not None and chat is False:
        raise InvalidRequest("--system needs a chat, so it cannot be used with --raw")
    params = SamplingParams(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    with _loaded(**settings_of(EngineConfig, (MODEL, *ENGINE_OPTIONS), values)) as llm:
        _generate(llm, text, params, chat, system, priority, as_json)


app.command(cls=console.TopicCommand, epilog=EPILOG)(serve)


@app.command(epilog="Example:  headway demo --output picture.png")
@takes(PREEMPTION_MODE, first=[MODEL])
def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", help="Where the picture goes.")
    ] = "headway-demo.png",
    seconds: Annotated[
        float, typer.Option(min=3, max=600, help="How long each of the two runs should take.")
    ] = 28.0,
    seed: Annotated[int, typer.Option(help="Of the lengths and arrival times.")] = 0,
    as_json: _Json = False,
    **values: Any,
) -> None:
    """Watch urgent requests overtake batch work (about a minute).

    24 batch requests fill a small KV pool with 8 slots, and every two seconds or so an urgent
    question arrives. The same load runs by priority and first come, first served; a table and a
    picture compare the two.
    """
    from headway.demo.show import check_output, settings, show  # noqa: PLC0415

    path = check_output(output)
    with _loaded(**settings(values["model"], values["preemption_mode"])) as llm:
        show(llm, path, seed, seconds, as_json)


@app.command(epilog="Example:  headway models --json")
def models(as_json: _Json = False) -> None:
    """List the models that can be named; any other .gguf file is named by its path."""
    infos = list_models()
    if as_json:
        rows = [
            {
                "name": info.spec.name,
                "description": info.spec.description,
                "license": info.spec.license,
                "bytes": info.spec.size,
                "cached": info.cached,
                "path": str(info.path),
                "default": info.spec.name == DEFAULT_MODEL,
            }
            for info in infos
        ]
        print(json.dumps({"models": rows}, ensure_ascii=False))
        return
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table("model", "", "size", "licence", "here?", box=box.SIMPLE_HEAD)
    for info in infos:
        spec = info.spec
        cached = "yes" if info.cached else "fetched on first use"
        table.add_row(
            spec.name, spec.description, f"{spec.size / 1e6:.0f} MB", spec.license, cached
        )
    terminal = Console()
    terminal.print(table)
    terminal.print("Any other model: --model path/to/file.gguf (llama, qwen2, qwen3)")


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"standard input is not UTF-8 at byte {error.start}") from None
    if not prompt:
        raise InvalidRequest("the prompt is empty, needs at least 1 character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InvalidRequest("the prompt is not UTF-8")
    return prompt


@contextmanager
def _loaded(**settings: Any) -> Iterator[LLM]:
    """A model, ready; the stages of getting there are shown on a terminal."""
    with console.startup_bar() as progress:
        from headway.engine.llm import LLM  # noqa: PLC0415

        llm = LLM(progress=progress, **settings)
    try:
        yield llm
    finally:
        llm.close()


def _generate(
    llm: LLM,
    prompt: str,
    params: SamplingParams,
    chat: bool | None,
    system: str | None,
    priority: int,
    as_json: bool,
) -> None:
    from headway.core.request import Request  # noqa: PLC0415
    from headway.engine.llm import tokenize_prompt  # noqa: PLC0415
    from headway.engine.outputs import RequestOutput  # noqa: PLC0415

    if chat is None:
        chat = system is not None or llm.tokenizer.chat_template is not None
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        token_ids = llm.render_chat([*messages, {"role": "user", "content": prompt}])
    else:
        token_ids = tokenize_prompt(llm.tokenizer, prompt)
    request = Request(
        "prompt", priority, prompt, prompt_token_ids=token_ids, sampling_params=params
    )
    llm.engine.submit(request)
    result = RequestOutput.of(request)
    is_at_line_start = True
    try:
        while not result.finished:
            for output in llm.engine.step():
                if output.error is not None:
                    raise output.error
                result.extend(output)
                if output.text and not as_json:
                    is_at_line_start = output.text.endswith("\n")
                    print(output.text, end="", flush=True)
    finally:
        if not is_at_line_start:
            print(flush=True)
    if as_json:
        print(json.dumps(_as_json(result), ensure_ascii=False))


def _as_json(result: RequestOutput) -> dict[str, Any]:
    completion, metrics = result.outputs[0], result.metrics
    assert metrics is not None
    return {
        "prompt": result.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "priority": result.priority,
        "seed": result.sampling_params.seed,
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
        "token_ids": completion.token_ids,
        "ttft_seconds": metrics.ttft,
        "latency_seconds": metrics.latency,
    }
