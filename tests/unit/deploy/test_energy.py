"""Energy comes from a counter that grows under load, or not at all and with the reason.

The directories below have the layout of Linux's powercap; their counters are driven by the test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_prune.deploy.energy import Counter, find_counters, measure


def zone(root: Path, directory: str, name: str, value: object = 0, span: int | None = 10**9) -> Path:
    folder = root / directory
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    if span is not None:
        (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder / "energy_uj"


def adds(path: Path, amount: int, span: int = 10**9):
    """Return work that costs `amount` microjoules."""

    def work():
        path.write_text(str((int(path.read_text()) + amount) % span))

    return work


def test_value_is_millijoules_per_run(tmp_path):
    work = adds(zone(tmp_path, "intel-rapl:0", "package-0"), 5_000)
    energy = measure(work, seconds=0.1, root=tmp_path)
    assert energy.value == pytest.approx(5.0)
    assert (energy.source, energy.domain, energy.reason) == ("powercap", "package-0", None)
    assert energy.runs > 2


def test_wrap_around_is_counted(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0", value=999_990_000)
    energy = measure(adds(path, 4_000), seconds=0.1, root=tmp_path)
    assert int(path.read_text()) < 999_990_000
    assert energy.value == pytest.approx(4.0)


def test_packages_are_added_and_their_parts_and_the_platform_are_not(tmp_path):
    first = adds(zone(tmp_path, "intel-rapl:0", "package-0"), 1_000)
    second = adds(zone(tmp_path, "intel-rapl:1", "package-1"), 2_000)
    core = adds(zone(tmp_path, "intel-rapl:0:0", "core"), 64_000)
    platform = adds(zone(tmp_path, "intel-rapl:2", "psys"), 128_000)
    energy = measure(lambda: (first(), second(), core(), platform()), seconds=0.1, root=tmp_path)
    assert energy.value == pytest.approx(3.0)
    assert energy.domain == "package-0+package-1"


def test_counter_that_stands_still_is_not_a_sensor(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", value=123)
    energy = measure(lambda: None, seconds=0.05, root=tmp_path)
    assert energy.value is None
    assert "does not grow under load" in energy.reason


def test_counter_that_moves_once_is_not_a_sensor(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0")
    energy = measure(lambda: path.write_text("7"), seconds=0.05, root=tmp_path)
    assert energy.value is None


def test_no_directory_and_no_package_are_reasons(tmp_path):
    assert "does not exist" in measure(lambda: None, root=tmp_path / "absent").reason
    zone(tmp_path, "dtpm:0", "memory")
    assert "no processor package" in measure(lambda: None, root=tmp_path).reason


def test_unreadable_counter_is_a_reason(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0")
    path.unlink()
    path.mkdir()  # root may read any file, but nobody a directory as one
    counters, reason = find_counters(tmp_path)
    assert counters == []
    assert str(path) in reason


def test_counter_that_vanishes_during_the_run_is_a_reason(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0")
    energy = measure(lambda: path.unlink(missing_ok=True), seconds=0.05, root=tmp_path)
    assert energy.value is None
    assert "could not be read" in energy.reason


def test_going_back_without_a_known_range_is_refused():
    with pytest.raises(ValueError, match="no known range"):
        Counter(Path("x"), "package-0", None).grown(2, 1)
