"""The exceptions: one tree, all exported, and messages that read."""

from __future__ import annotations

import pytest

from headway.core import errors


def defined_errors() -> list[type[Exception]]:
    return [one for one in vars(errors).values() if isinstance(one, type)]


def test_all_is_what_is_defined() -> None:
    assert errors.__all__ == sorted(one.__name__ for one in defined_errors())


@pytest.mark.parametrize("error", defined_errors())
def test_every_error_is_a_headway_error_and_documented(error: type[Exception]) -> None:
    assert issubclass(error, errors.HeadwayError)
    assert error.__doc__
    assert error.__name__ in (errors.__doc__ or "")
    assert str(error("request 'a' is unknown")) == "request 'a' is unknown"


def test_whose_fault_it_is() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.UnknownRequest, KeyError)
    assert issubclass(errors.InvalidTransition, errors.InternalError)
    for one in (errors.DuplicateRequest, errors.UnknownRequest, errors.RequestTooLong):
        assert issubclass(one, errors.InvalidRequest)
    assert not issubclass(errors.QueueFull, errors.InvalidRequest)
    assert not issubclass(errors.InternalError, errors.InvalidRequest)
