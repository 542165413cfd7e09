"""Options of commands, each in one place: its name, its help, how it is read, and what it sets.

An option that sets a field of a configuration has the field's default, so that the command line and
Python agree. A command takes options with ``takes`` and gets their values as keyword arguments;
``settings_of`` makes the fields of a configuration of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import typer

from headway.core.config import PreemptionMode
from headway.core.policy import POLICIES
from headway.core.reclaim import VictimOrder
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO
from headway.engine.config import EngineConfig
from headway.executor.precision import PRECISIONS

__all__ = [
    "ENGINE_OPTIONS",
    "ENGINE_TOPIC",
    "MAX_STEP_MS",
    "MODEL",
    "PREEMPTION_MODE",
    "QUEUE_OPTIONS",
    "SHARING_OPTIONS",
    "SLOS",
    "Option",
    "format_bytes",
    "parse_bytes",
    "setting",
    "settings_of",
    "takes",
]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Option:
    """An option of one or more commands.

    Attributes:
        name: of the keyword argument; the option is spelled with dashes, unless ``flags`` say
            otherwise.
        kind: the type that is read from the command line.
        default: of the command line's value.
        help: one or two sentences.
        topic: under which help lists it; None = with the options that have none.
        config, field_name: the configuration that it sets a field of; None, "" = it sets none.
        read: from the command line's value to the field's; None = it is the same.
        flags: all spellings, if they do not follow from ``name``.
        details: further arguments of ``typer.Option``.
    """

    name: str
    kind: Any
    default: Any
    help: str
    topic: str | None = None
    config: type | None = None
    field_name: str = ""
    read: Callable[[Any], Any] | None = None
    flags: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def with_default(self, default: Any) -> Option:
        """The same option of a command that has a default of its own."""
        return replace(self, default=default)

    def parameter(self) -> inspect.Parameter:
        """The option as a parameter of a function that Typer makes a command of."""
        option = typer.Option(
            *self.flags, help=self.help, rich_help_panel=self.topic, **self.details
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[self.kind, option],
        )


def setting(
    config: type,
    field_name: str,
    help: str,
    topic: str | None = None,
    *,
    name: str | None = None,
    kind: Any = None,
    read: Callable[[Any], Any] | None = None,
    write: Callable[[Any], Any] | None = None,
    flags: tuple[str, ...] = (),
    **details: Any,
) -> Option:
    """An option that sets a field of a configuration, and has its default.

    Args:
        config: a dataclass.
        field_name: of it.
        help, topic, read, flags, details: see ``Option``.
        name: None = the field's.
        kind: None = the field's type.
        write: from the field's default to the command line's; None = it is the same, or none if
            the option is read.
    """
    (own,) = (own for own in fields(config) if own.name == field_name)
    default = own.default
    if write is not None:
        default = write(default)
    elif read is not None or default is MISSING:
        default = None
    return Option(
        field_name if name is None else name,
        _type_of(config, own) if kind is None else kind,
        default,
        help,
        topic,
        config,
        field_name,
        read,
        flags,
        details,
    )


def _type_of(config: type, own: Field[Any]) -> Any:
    """The type of a field; the other fields' types may be known to type checkers only."""
    alone = type(config.__name__, (), {"__annotations__": {own.name: own.type}})
    alone.__module__ = config.__module__
    return get_type_hints(alone)[own.name]


def takes(*options: Option, first: Sequence[Option] = ()) -> Callable[[_F], _F]:
    """A decorator: a command that has ``**values`` for its last parameter takes these options.

    Args:
        options: after the command's own parameters.
        first: before them.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function, eval_str=True)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters = [
            *(option.parameter() for option in first),
            *own,
            *(option.parameter() for option in options),
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def settings_of(
    config: type, options: Iterable[Option], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a configuration that options set; what was not given is left to it.

    Args:
        config: of which the fields are wanted.
        options: of the command.
        values: that the command got.

    Raises:
        ConfigError: a value cannot be read.
    """
    given = {
        option: values[option.name]
        for option in options
        # An option that may be given several times is an empty list if it was not.
        if option.config is config and values[option.name] not in (None, [], ())
    }
    return {
        option.field_name: value if option.read is None else option.read(value)
        for option, value in given.items()
    }


# ---------------------------------------------------------------------- sizes

_UNITS: Final = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """``512M``, ``2GiB``, ``1.5G`` → bytes. K, Ki, KiB are 1024; KB is 1000.

    Raises:
        typer.BadParameter: it is no number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B?)", text.strip().upper())
    if match is None or (not match[2] and match[3] not in ("", "B")):
        raise typer.BadParameter(f"{text!r} is not a size such as 512M, 2GiB or 1000000")
    if not match[2]:
        return int(float(match[1]))
    return int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** _UNITS[match[2]])


def format_bytes(size: int) -> str:
    """The shortest text that ``parse_bytes`` reads as this size."""
    for unit in "TGMK":
        count, rest = divmod(size, 1024 ** _UNITS[unit])
        if count and not rest:
            return f"{count}{unit}iB"
    return str(size)


# ---------------------------------------------------------------------- the engine's

ENGINE_TOPIC: Final = "Engine settings"
_PRIORITIES: Final = "Priorities and targets"
_QUEUE: Final = "Queue"

MODEL: Final = setting(
    EngineConfig,
    "model",
    "A known model (headway models) or a .gguf file.",
    kind=str,
    flags=("--model", "-m"),
)
PREEMPTION_MODE: Final = setting(
    EngineConfig,
    "preemption_mode",
    "How memory is taken from less urgent requests.",
    ENGINE_TOPIC,
    kind=str,
    write=lambda mode: mode.value,
    metavar=f"[{'|'.join(mode.value for mode in PreemptionMode)}]",
)

#: Of every command that runs a model as the user wants it.
ENGINE_OPTIONS: Final = (
    setting(
        EngineConfig,
        "scheduling_policy",
        "Who goes next.",
        ENGINE_TOPIC,
        kind=str,
        metavar=f"[{'|'.join(POLICIES)}]",
    ),
    PREEMPTION_MODE,
    setting(EngineConfig, "max_num_seqs", "Requests in a step, at most.", ENGINE_TOPIC),
    setting(EngineConfig, "max_num_batched_tokens", "Tokens in a step, at most.", ENGINE_TOPIC),
    setting(
        EngineConfig,
        "max_model_len",
        "Longest context in tokens.",
        ENGINE_TOPIC,
        show_default="the model's",
    ),
    setting(
        EngineConfig,
        "kv_cache_bytes",
        "Memory for keys and values, such as 512M or 2GiB.",
        ENGINE_TOPIC,
        parser=parse_bytes,
        metavar="SIZE",
        show_default="a quarter of the free memory",
    ),
    setting(
        EngineConfig,
        "swap_space_bytes",
        "Memory for what has to leave the KV cache; 0 for none.",
        ENGINE_TOPIC,
        parser=parse_bytes,
        metavar="SIZE",
        show_default="1GiB, if there is room",
    ),
    setting(EngineConfig, "enable_prefix_caching", "Compute equal beginnings once.", ENGINE_TOPIC),
    setting(
        EngineConfig,
        "num_threads",
        "Threads that compute.",
        ENGINE_TOPIC,
        show_default="one for each processor",
    ),
    setting(
        EngineConfig,
        "precision",
        "How activations are held where they are multiplied: int8 is the fastest, bf16 nearer to "
        "float32.",
        ENGINE_TOPIC,
        kind=str,
        metavar=f"[{'|'.join(PRECISIONS)}]",
    ),
)

SLOS: Final = setting(
    EngineConfig,
    "slos",
    "Targets for requests that are at least so urgent, as 0:ttft=200ms,tpot=40ms "
    "(time to first token, time per token); may be given several times. Steps are cut so "
    "that they can be met.",
    _PRIORITIES,
    name="slo",
    kind=list[str] | None,
    read=lambda texts: tuple(map(SLO.parse, texts)),
    metavar="PRIORITY:TARGETS",
)
MAX_STEP_MS: Final = setting(
    EngineConfig,
    "max_step_ms",
    "No step is predicted to take longer, targets or not; an urgent request waits for the "
    "step in flight.",
    _PRIORITIES,
    metavar="MS",
)
SHARING_OPTIONS: Final = (
    setting(
        SharingRules,
        "share",
        "How much less urgent work rides along in a step with more urgent work: as much as keeps "
        "the step within a time such as 40ms, all, or none.",
        _PRIORITIES,
        metavar="all|none|TIME",
    ),
    setting(
        SharingRules,
        "prefill_share",
        "While more urgent work is about, the part of a step's tokens that less urgent prompts may "
        "have, above 0 and at most 1.",
        _PRIORITIES,
        metavar="PART",
    ),
    setting(
        SharingRules,
        "victim",
        "Whose memory is taken among equally urgent requests: of the last-ranked, or of the one "
        "that is cheapest to compute again.",
        _PRIORITIES,
        kind=str,
        write=lambda victim: victim.value,
        metavar=f"[{'|'.join(order.value for order in VictimOrder)}]",
    ),
    setting(
        SharingRules,
        "max_preemptions",
        "A request that has lost memory so often keeps what it has.",
        _PRIORITIES,
        show_default="no limit",
    ),
)
QUEUE_OPTIONS: Final = (
    setting(
        EngineConfig,
        "max_num_queued_reqs",
        "Requests that may wait. When they do, the least urgent one gets 503 and when to try "
        "again.",
        _QUEUE,
    ),
    setting(
        EngineConfig,
        "max_queued_tokens",
        "Tokens of prompts that may wait.",
        _QUEUE,
        show_default="no limit",
    ),
    setting(
        EngineConfig,
        "queue_timeout",
        "A request that has waited so long for its first step gets 503.",
        _QUEUE,
        metavar="SECONDS",
        show_default="no limit",
    ),
)
