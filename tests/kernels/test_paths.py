"""The paths: which of them a processor can run, and what HEADWAY_KERNELS may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.core.errors import ConfigError
from headway.kernels.paths import PATHS, Processor, available_paths, read_processor

_AVX2 = "fpu sse2 avx avx2 fma f16c"
_AVX512 = f"{_AVX2} avx512f avx512dq avx512bw avx512vl avx512_vnni"

_CPUINFO = """\
processor\t: {number}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
cpu MHz\t\t: {mhz}
flags\t\t: {flags}
"""


@pytest.fixture(autouse=True)
def none_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWAY_KERNELS", raising=False)


def processor(flags: str, machine: str = "x86_64") -> Processor:
    return Processor(machine, frozenset(flags.split()), "")


@pytest.mark.parametrize(
    ("flags", "paths"),
    [
        (f"{_AVX512} avx512_bf16", ["avx512bf16", "avx512", "avx2", "portable"]),
        (_AVX512, ["avx512", "avx2", "portable"]),
        # Skylake: AVX-512 without the integer products.
        (_AVX512.replace("avx512_vnni", ""), ["avx2", "portable"]),
        (_AVX2, ["avx2", "portable"]),
        # Sandy Bridge.
        ("fpu sse2 avx", ["portable"]),
        ("", ["portable"]),
    ],
)
def test_a_processor_runs_what_it_has_the_features_for(flags: str, paths: list[str]) -> None:
    assert available_paths(processor(flags)) == paths


def test_other_architectures_run_the_portable_path() -> None:
    assert available_paths(processor(_AVX2, machine="aarch64")) == ["portable"]


def test_the_processor_at_hand_runs_one_at_least() -> None:
    found = available_paths()
    assert found[-1] == "portable"
    assert set(found) <= set(PATHS)


def write_cpuinfo(file: Path, mhz: float = 2000.0, flags: str = _AVX2) -> Path:
    file.write_text("\n".join(_CPUINFO.format(number=i, mhz=mhz + i, flags=flags) for i in (0, 1)))
    return file


def test_features_are_read_from_linux(tmp_path: Path) -> None:
    found = read_processor(write_cpuinfo(tmp_path / "cpuinfo"), "x86_64")
    assert found.is_x86_64
    assert found.features == frozenset(_AVX2.split())
    assert available_paths(found) == ["avx2", "portable"]


def test_identity_follows_the_features_and_not_the_clock(tmp_path: Path) -> None:
    first = read_processor(write_cpuinfo(tmp_path / "first"), "x86_64")
    faster = read_processor(write_cpuinfo(tmp_path / "faster", mhz=3000.0), "x86_64")
    other = read_processor(write_cpuinfo(tmp_path / "other", flags=_AVX512), "x86_64")
    assert first.identity == faster.identity
    assert first.identity != other.identity


@pytest.mark.parametrize("text", [None, "", "no colon\n", "flags\n"])
def test_a_processor_that_does_not_say_runs_the_portable_path(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    found = read_processor(tmp_path / "cpuinfo", "x86_64")
    assert available_paths(found) == ["portable"]
    assert "x86_64" in found.identity


def test_headway_kernels_forces_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_KERNELS", "portable")
    assert available_paths(processor(_AVX512)) == ["portable"]
    monkeypatch.setenv("HEADWAY_KERNELS", "avx2")
    assert available_paths(processor(_AVX512)) == ["avx2"]
    monkeypatch.setenv("HEADWAY_KERNELS", "")
    assert available_paths(processor(_AVX2)) == ["avx2", "portable"]


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_KERNELS", "AVX2")
    with pytest.raises(ConfigError) as caught:
        available_paths(processor(_AVX2))
    assert str(caught.value) == "HEADWAY_KERNELS is 'AVX2', must be one of avx2, portable"


def test_a_path_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_KERNELS", "avx512bf16")
    with pytest.raises(ConfigError) as caught:
        available_paths(processor(_AVX512))
    assert str(caught.value) == (
        "HEADWAY_KERNELS is 'avx512bf16', but this processor has no avx512_bf16; "
        "it can run avx512, avx2, portable"
    )
