"""API keys as the operator gives them: on the command line, or in a file with limits.

The file is JSON: a list of objects, one for each key. Everything but ``key`` and ``tenant`` may be
left out, and means no limit::

    [
      {"key": "sk-web-8f2c…", "tenant": "web", "most_urgent_priority": 0, "max_concurrent": 32},
      {"key": "sk-batch-1d7a…", "tenant": "batch", "most_urgent_priority": 10, "cache_group": "us"}
    ]

Messages never contain a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from headway.core.errors import ConfigError
from headway.core.priority import MAX_PRIORITY, MIN_PRIORITY

__all__ = ["ApiKey", "collect_api_keys"]

#: What can stand in an ``Authorization`` header without quoting.
_KEY: Final = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class ApiKey:
    """A key, whose it is, and what it allows.

    Attributes:
        key: visible ASCII.
        tenant: the name of its owner.
        most_urgent_priority: the smallest priority it may ask for; None = any.
        max_concurrent: sequences at a time (of a request, its prompts times ``n``); None = as
            many as there is room for.
        cache_group: tenants of the same group share cached prefixes; None = the tenant shares its
            own with none. A tenant can find out what the other tenants of its group have sent, by
            how long a guess takes.

    Raises:
        ConfigError: a value is out of range.
    """

    key: str = field(repr=False)
    tenant: str
    most_urgent_priority: int | None = None
    max_concurrent: int | None = None
    cache_group: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tenant, str) or not self.tenant:
            raise ConfigError(f"the tenant of an API key is {self.tenant!r}, must be a name")
        if "/" in self.tenant:
            raise ConfigError(
                f"the tenant of an API key is {self.tenant!r}, must be a name without a slash"
            )
        if not isinstance(self.key, str) or not _KEY.fullmatch(self.key):
            raise ConfigError(
                f"the API key of {self.tenant!r} must be visible ASCII characters, at least one"
            )
        group = self.cache_group
        if group is not None and (not isinstance(group, str) or not group):
            raise ConfigError(f"cache_group of {self.tenant!r} is {group!r}, must be a name")
        for name, minimum, maximum in (
            ("most_urgent_priority", MIN_PRIORITY, MAX_PRIORITY),
            ("max_concurrent", 1, MAX_PRIORITY),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not minimum <= value <= maximum):
                raise ConfigError(
                    f"{name} of {self.tenant!r} is {value!r}, must be an integer of "
                    f"{minimum} … {maximum}"
                )


_FIELDS: Final = tuple(field.name for field in fields(ApiKey))


def collect_api_keys(keys: Sequence[str] = (), file: Path | None = None) -> tuple[ApiKey, ...]:
    """The keys of the command line, without limits, and those of the file.

    Raises:
        ConfigError: the file cannot be read, is not of the form above or has no keys, or a key or
            tenant occurs twice.
    """
    names = ["default"] if len(keys) == 1 else [f"key-{n}" for n in range(1, len(keys) + 1)]
    found = [ApiKey(key, name) for key, name in zip(keys, names, strict=True)]
    if file is not None:
        found += _read(file)
    _refuse_duplicates(found)
    return tuple(found)


def _read(file: Path) -> list[ApiKey]:
    try:
        entries = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"API keys: {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"API keys: {file} is not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"API keys: {file} must hold a list of objects, at least one")
    return [_entry(file, number, entry) for number, entry in enumerate(entries, 1)]


def _entry(file: Path, number: int, entry: object) -> ApiKey:
    where = f"API keys: {file}, entry {number}"
    if not isinstance(entry, dict) or not {"key", "tenant"} <= entry.keys():
        raise ConfigError(f"{where} must be an object with key and tenant")
    if unknown := sorted(entry.keys() - set(_FIELDS)):
        raise ConfigError(f"{where} has the field {unknown[0]!r}, known are {', '.join(_FIELDS)}")
    try:
        return ApiKey(**entry)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _refuse_duplicates(keys: Iterable[ApiKey]) -> None:
    owners: dict[str, str] = {}
    for key in keys:
        if key.key in owners:
            raise ConfigError(
                f"the API key of {key.tenant!r} is that of {owners[key.key]!r} too, must be its own"
            )
        if key.tenant in owners.values():
            raise ConfigError(f"the tenant {key.tenant!r} has two API keys, must have one")
        owners[key.key] = key.tenant
