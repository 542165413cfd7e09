"""Every exception Headway raises on purpose, split by whose fault it is.

::

    HeadwayError
    ├── InvalidRequest            the caller's: the request can never be served as it stands
    │   ├── DuplicateRequest      its id is already in use
    │   ├── UnknownRequest        no unfinished request has that id
    │   └── RequestTooLong        longer than the context, or than the whole pool could hold
    ├── ConfigError               the operator's: a setting is out of range
    ├── ModelError                the model file's
    │   ├── UnknownModel          neither a known name nor a file
    │   ├── UnsupportedModel      well-formed, but of an architecture or format we do not run
    │   ├── DamagedModel          not a whole GGUF file
    │   └── ModelDownloadFailed   could not be obtained
    ├── KernelError               the machine's: the kernels cannot be compiled or loaded on it
    ├── Overloaded                nobody's: too much work; try again after ``retry_after`` seconds
    │   ├── QueueFull             there is no room, or a more urgent request has taken it
    │   └── QueueTimeout          it has waited for its first step longer than it may
    ├── SlowReader                the reader's: too much output waits for it
    ├── EngineStopped             the engine was closed, or its step loop died
    └── InternalError             ours
        └── InvalidTransition     a request was moved along an edge that does not exist

Messages are one line and name the offending value and the limit it broke. Only where a compiler
failed, up to three lines of what it said follow.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DamagedModel",
    "DuplicateRequest",
    "EngineStopped",
    "HeadwayError",
    "InternalError",
    "InvalidRequest",
    "InvalidTransition",
    "KernelError",
    "ModelDownloadFailed",
    "ModelError",
    "Overloaded",
    "QueueFull",
    "QueueTimeout",
    "RequestTooLong",
    "SlowReader",
    "UnknownModel",
    "UnknownRequest",
    "UnsupportedModel",
]


class HeadwayError(Exception):
    """Base of every deliberate error; catching it catches nothing else."""


class InvalidRequest(HeadwayError, ValueError):
    """The request can never be served as it stands; the message says which value to change."""


class DuplicateRequest(InvalidRequest):
    """The request id belongs to an unfinished request."""


class UnknownRequest(InvalidRequest, KeyError):
    """No unfinished request has this id."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class RequestTooLong(InvalidRequest):
    """The prompt and its output exceed the model's context, or the whole KV pool."""


class ConfigError(HeadwayError, ValueError):
    """A setting is out of range or contradicts another."""


class ModelError(HeadwayError):
    """The model cannot be used; the subclasses say why."""


class UnknownModel(ModelError):
    """Neither the name of a known model nor the path of a file."""


class UnsupportedModel(ModelError):
    """The file is whole, but its architecture, tokenizer or weight format is not supported."""


class DamagedModel(ModelError):
    """The file is truncated, corrupt, or no GGUF at all."""


class ModelDownloadFailed(ModelError):
    """The model could not be fetched; the message says how to do it by hand."""


class KernelError(HeadwayError):
    """The kernels cannot be compiled or loaded on this machine; the message says what to do."""


class Overloaded(HeadwayError):
    """There is more work than can be served; the request may be tried again.

    Args:
        message: one line.
        retry_after: seconds after which there should be room.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Overloaded):
    """The bounded queue has no room, or what was waiting in it was displaced by the more urgent."""


class QueueTimeout(Overloaded):
    """The request has waited for its first step longer than the operator lets any wait."""


class SlowReader(HeadwayError):
    """More output waits for its reader than is kept; the request was ended."""


class EngineStopped(HeadwayError):
    """The engine no longer runs, so the request cannot be finished."""


class InternalError(HeadwayError):
    """A bug in Headway."""


class InvalidTransition(InternalError):
    """A request was moved along an edge that the transition table does not have."""
