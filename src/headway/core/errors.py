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
    ├── QueueFull                 nobody's: there is no room now; try again later
    ├── EngineStopped             the engine was closed, or its step loop died
    └── InternalError             ours
        └── InvalidTransition     a request was moved along an edge that does not exist

Messages are one line and name the offending value and the limit it broke.
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
    "ModelDownloadFailed",
    "ModelError",
    "QueueFull",
    "RequestTooLong",
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


class QueueFull(HeadwayError):
    """The bounded queue has no room; the request was not accepted and may be tried again."""


class EngineStopped(HeadwayError):
    """The engine no longer runs, so the request cannot be finished."""


class InternalError(HeadwayError):
    """A bug in Headway."""


class InvalidTransition(InternalError):
    """A request was moved along an edge that the transition table does not have."""
