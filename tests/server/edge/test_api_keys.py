"""API keys from the command line and from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headway.core.errors import ConfigError
from headway.server.edge.api_keys import ApiKey, collect_api_keys


def test_keys_of_the_command_line_have_no_limits() -> None:
    assert collect_api_keys(["one"]) == (ApiKey("one", "default"),)
    assert collect_api_keys(["one", "two"]) == (ApiKey("one", "key-1"), ApiKey("two", "key-2"))
    assert collect_api_keys() == ()


def test_a_file_adds_keys_with_limits(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(
        """[
            {"key": "sk-w", "tenant": "web", "most_urgent_priority": -3, "max_concurrent": 2},
            {"key": "sk-b", "tenant": "batch", "cache_group": "ours"}
        ]"""
    )
    assert collect_api_keys(["sk-0"], file) == (
        ApiKey("sk-0", "default"),
        ApiKey("sk-w", "web", -3, 2),
        ApiKey("sk-b", "batch", None, None, "ours"),
    )


def entry(**fields: Any) -> dict[str, Any]:
    return {"key": "sk-secret", "tenant": "web"} | fields


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ("\udcff", ["not JSON"]),
        ("{}", ["a list of objects"]),
        ("[]", ["at least one"]),
        ([entry(), "sk-secret"], ["entry 2", "key and tenant"]),
        ([{"key": "sk-secret"}], ["entry 1", "key and tenant"]),
        ([entry(limit=3)], ["entry 1", "'limit'", "max_concurrent"]),
        ([entry(tenant="")], ["tenant", "''"]),
        ([entry(tenant=7)], ["tenant", "7"]),
        ([entry(tenant="web/eu")], ["tenant", "'web/eu'", "slash"]),
        ([entry(key="")], ["'web'", "visible ASCII"]),
        ([entry(key=7)], ["'web'", "visible ASCII"]),
        ([entry(key="sk-secret ")], ["'web'", "visible ASCII"]),
        ([entry(key="sk-secret\u00e9")], ["'web'", "visible ASCII"]),
        ([entry(most_urgent_priority=0.5)], ["most_urgent_priority of 'web' is 0.5", "integer"]),
        ([entry(most_urgent_priority=2**63)], ["most_urgent_priority of 'web' is", str(2**63)]),
        ([entry(max_concurrent=0)], ["max_concurrent of 'web' is 0", "1 …"]),
        ([entry(max_concurrent=True)], ["max_concurrent of 'web' is True", "integer"]),
        ([entry(cache_group="")], ["cache_group of 'web' is ''", "a name"]),
        ([entry(cache_group=7)], ["cache_group of 'web' is 7", "a name"]),
        ([entry(), entry(tenant="batch")], ["'batch'", "'web'", "its own"]),
        ([entry(), entry(key="sk-secret-too")], ["'web'", "two API keys"]),
    ],
)
def test_a_bad_file_is_refused_in_a_line_without_the_key(
    tmp_path: Path, content: Any, words: list[str]
) -> None:
    file = tmp_path / "keys.json"
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as info:
        collect_api_keys(file=file)
    message = str(info.value)
    assert "\n" not in message
    assert "secret" not in message
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody\.json: No such file"):
        collect_api_keys(file=tmp_path / "nobody.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        collect_api_keys(file=tmp_path)


def test_a_key_of_the_command_line_cannot_be_in_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([entry()]))
    with pytest.raises(ConfigError, match=r"'web' is that of 'default' too"):
        collect_api_keys(["sk-secret"], file)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(ApiKey("sk-secret", "web"))
