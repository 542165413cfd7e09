"""The memory that can be had, on made-up systems."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from headway.executor.memory import available_memory

GB = 1 << 30
FREE = 64 * GB
NO_LIMIT = 9223372036854771712


def system(root: Path, files: Mapping[str, str | int] = {}, cgroup: str = "") -> int:
    """What is available on a system of 64 GB free with these files and this /proc/self/cgroup."""
    proc = {
        "proc/meminfo": f"MemTotal: {2 * FREE // 1024} kB\nMemAvailable:   {FREE // 1024} kB\n",
        "proc/self/cgroup": cgroup,
    }
    for name, content in (proc | dict(files)).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return available_memory(root)


def v2(
    group: str,
    limit: str | int,
    used: str | int = 0,
    inactive_file: int = 0,
    mount: str = "sys/fs/cgroup",
) -> dict[str, str | int]:
    directory = f"{mount}/{group}".rstrip("/")
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{used}\n",
        f"{directory}/memory.stat": f"anon 5\nfile {3 * GB}\ninactive_file {inactive_file}\n",
    }


def v1(
    group: str,
    limit: str | int,
    used: str | int = 0,
    inactive_file: int = 0,
    least_limit: int = NO_LIMIT,
    use_hierarchy: int = 1,
) -> dict[str, str | int]:
    directory = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit}\n",
        f"{directory}/memory.usage_in_bytes": f"{used}\n",
        f"{directory}/memory.use_hierarchy": f"{use_hierarchy}\n",
        f"{directory}/memory.stat": (
            f"inactive_file 17\nhierarchical_memory_limit {least_limit}\n"
            f"total_inactive_file {inactive_file}\n"
        ),
    }


V1_CGROUP = "9:name=systemd:/\n4:hugetlb,memory:{}\n2:cpu,cpuacct:/elsewhere\n"


def test_this_machine_has_some() -> None:
    assert available_memory() > 1 << 20


def test_without_groups_it_is_what_the_system_has(tmp_path: Path) -> None:
    assert system(tmp_path) == FREE


def test_an_empty_system_is_asked_in_another_way(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 1 << 20


# ------------------------------------------------------------------------------ version 2


def test_v2_a_group_leaves_its_limit_less_its_use(tmp_path: Path) -> None:
    assert system(tmp_path, v2("app", 8 * GB, 3 * GB), "0::/app\n") == 5 * GB


def test_v2_file_pages_out_of_use_are_available(tmp_path: Path) -> None:
    assert system(tmp_path, v2("app", 8 * GB, 7 * GB, 4 * GB), "0::/app\n") == 5 * GB


def test_v2_more_file_pages_than_use_are_no_more_than_the_limit(tmp_path: Path) -> None:
    assert system(tmp_path, v2("app", 8 * GB, 1 * GB, 2 * GB), "0::/app\n") == 8 * GB


def test_v2_a_group_above_limits_too(tmp_path: Path) -> None:
    files = v2("a", 10 * GB, 9 * GB) | v2("a/b", 8 * GB, 2 * GB) | v2("a/b/c", "max", GB)
    assert system(tmp_path, files, "0::/a/b/c\n") == GB


def test_v2_a_group_beside_does_not_limit(tmp_path: Path) -> None:
    files = v2("a/b", "max") | v2("a/c", GB) | v2("a/b/d", GB)
    assert system(tmp_path, files, "0::/a/b\n") == FREE


def test_v2_no_limit(tmp_path: Path) -> None:
    assert system(tmp_path, v2("app", "max", 3 * GB), "0::/app\n") == FREE


def test_v2_a_limit_above_what_the_system_has(tmp_path: Path) -> None:
    assert system(tmp_path, v2("app", 2 * FREE, 3 * GB), "0::/app\n") == FREE


def test_v2_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert system(tmp_path, v2("app", GB, 2 * GB), "0::/app\n") == 0


@pytest.mark.parametrize("path", ["/", "/kubepods/pod1/abc", "/../../other", ""])
def test_v2_in_a_namespace_the_mount_is_the_group(tmp_path: Path, path: str) -> None:
    assert system(tmp_path, v2("", 8 * GB, 2 * GB), f"0::{path}\n") == 6 * GB


def test_v2_a_path_does_not_lead_out_of_the_mount(tmp_path: Path) -> None:
    files = v2("", 8 * GB) | v2("other", GB, mount="sys/fs")
    assert system(tmp_path, files, "0::/../other\n") == 8 * GB


def test_v2_a_group_whose_use_is_not_told(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/app/memory.max": 8 * GB}
    assert system(tmp_path, files, "0::/app\n") == 8 * GB


# ------------------------------------------------------------------------------ version 1


def test_v1_a_group_leaves_its_limit_less_its_use(tmp_path: Path) -> None:
    files = v1("", NO_LIMIT, 50 * GB) | v1("docker/abc", 8 * GB, 5 * GB, 2 * GB)
    assert system(tmp_path, files, V1_CGROUP.format("/docker/abc")) == 5 * GB


def test_v1_a_group_above_limits_too(tmp_path: Path) -> None:
    files = v1("docker", 9 * GB, 6 * GB) | v1("docker/abc", 8 * GB, 2 * GB)
    assert system(tmp_path, files, V1_CGROUP.format("/docker/abc")) == 3 * GB


def test_v1_a_group_above_that_does_not_count_its_members_does_not_limit(tmp_path: Path) -> None:
    files = v1("docker", GB, use_hierarchy=0) | v1("docker/abc", 8 * GB, 2 * GB)
    assert system(tmp_path, files, V1_CGROUP.format("/docker/abc")) == 6 * GB


def test_v1_a_limit_above_the_mount_is_known_to_the_group(tmp_path: Path) -> None:
    files = v1("", NO_LIMIT, 2 * GB, least_limit=7 * GB)
    assert system(tmp_path, files, V1_CGROUP.format("/docker/abc")) == 5 * GB


def test_v1_no_limit(tmp_path: Path) -> None:
    files = v1("", NO_LIMIT, 50 * GB) | v1("app", NO_LIMIT, 3 * GB)
    assert system(tmp_path, files, V1_CGROUP.format("/app")) == FREE


def test_v1_a_name_with_a_colon(tmp_path: Path) -> None:
    files = v1("system.slice/a:b", 8 * GB)
    assert system(tmp_path, files, V1_CGROUP.format("/system.slice/a:b")) == 8 * GB


# ------------------------------------------------------------------------------ both versions


def test_hybrid_the_first_version_has_the_memory(tmp_path: Path) -> None:
    files = v1("app", 8 * GB, 3 * GB) | {"sys/fs/cgroup/unified/app.service/cgroup.procs": ""}
    cgroup = V1_CGROUP.format("/app") + "0::/app.service\n"
    assert system(tmp_path, files, cgroup) == 5 * GB


def test_hybrid_the_second_version_has_the_memory(tmp_path: Path) -> None:
    files = v2("app.service", 4 * GB, GB, mount="sys/fs/cgroup/unified")
    cgroup = "9:name=systemd:/app.service\n0::/app.service\n"
    assert system(tmp_path, files, cgroup) == 3 * GB


# ------------------------------------------------------------------------------ strange contents

GARBAGE = ["", "\n", "-1", "1_000", "12 apples", "٣", "9" * 5000, "\0\0", "1e9", "max max"]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_limit_that_is_no_number_limits_nothing(tmp_path: Path, garbage: str) -> None:
    assert system(tmp_path, v2("", garbage) | v1("", garbage), "0::/\n") == FREE


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_use_that_is_no_number_leaves_the_limit(tmp_path: Path, garbage: str) -> None:
    assert system(tmp_path, v2("", 8 * GB, garbage), "0::/\n") == 8 * GB


@pytest.mark.parametrize("garbage", [*GARBAGE, "::::", "0:", "0::relative/../..", "a:memory:/x"])
def test_a_list_of_groups_that_is_none_leaves_the_mount(tmp_path: Path, garbage: str) -> None:
    assert system(tmp_path, v2("", 8 * GB), garbage) == 8 * GB


def test_directories_in_the_place_of_files(tmp_path: Path) -> None:
    for name in ("memory.max", "memory.current", "memory.stat"):
        (tmp_path / "sys/fs/cgroup" / name).mkdir(parents=True)
    assert system(tmp_path) == FREE


@given(
    contents=st.lists(st.binary(max_size=60), min_size=6, max_size=6),
)
def test_whatever_the_files_hold_it_is_a_number_of_bytes(contents: list[bytes]) -> None:
    names = (
        "proc/meminfo",
        "proc/self/cgroup",
        "sys/fs/cgroup/memory.max",
        "sys/fs/cgroup/memory.current",
        "sys/fs/cgroup/memory.stat",
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
    )
    with tempfile.TemporaryDirectory() as directory:
        for name, content in zip(names, contents, strict=True):
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert available_memory(Path(directory)) >= 0
