"""Guard, latency budget, both prunings, 8-bit training and export in one YAML: killed, resumed, two ranks."""

from __future__ import annotations

import json
import sys

import everything_cases
import pytest
import yaml
from everything_cases import CONFIG, fit, weights
from latency_cases import known_times
from magnitude_cases import LIGHTNING_WARNINGS
from structural_cases import assert_equal_state

from lightning_prune import cli
from lightning_prune.deploy import latency_table

FILES = ["dense.onnx", "pruned.int8.onnx", "pruned.onnx"]
pytestmark = [
    *LIGHTNING_WARNINGS,
    # Lightning 2.6 uses methods of jsonargparse that are deprecated there.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def exported(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "edge").glob("*.onnx"))}


def decided(folder):
    callbacks = json.loads((folder / "edge" / "report.json").read_text())["pruning"]["callbacks"]
    return {summary["callback"]: summary["history"] for summary in callbacks}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything") / "whole"
    assert fit(folder, devices=2) == 0, (folder / "log.txt").read_text()[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 4, 8])
def test_two_ranks_that_were_killed_end_with_the_same_bytes(whole, epoch):
    """Killed at the first cut, where the guard goes back, and while 8 bits are trained."""
    folder = whole.parent / f"killed-{epoch}"
    assert fit(folder, devices=2, killed_in=epoch) != 0
    assert not (folder / "edge" / "pruned.onnx").exists()
    assert fit(folder, devices=2, resume=True) == 0, (folder / "log.txt").read_text()[-3000:]
    assert list(exported(whole)) == FILES
    assert exported(folder) == exported(whole)
    assert_equal_state(weights(folder), weights(whole))
    assert decided(folder) == decided(whole)


def test_a_run_that_crashed_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(latency_table, "time_files", known_times)
    monkeypatch.setattr(sys, "argv", ["test"])

    def run(folder, *more, resume=False):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        content = yaml.safe_load(CONFIG)
        content["trainer"]["callbacks"] += more
        content["trainer"]["callbacks"][4]["init_args"]["baseline"] = False  # a file less
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        arguments = ["fit", "--config", "config.yaml"]
        cli.run([*arguments, *(["--ckpt_path", "kept/last.ckpt"] if resume else [])], "pytorch_lightning")

    run(tmp_path / "whole")
    crash = {"class_path": f"{everything_cases.__name__}.Crash", "init_args": {"epoch": 4}}
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "crashed", crash)
    run(tmp_path / "crashed", resume=True)
    assert list(exported(tmp_path / "whole")) == FILES[1:]
    assert exported(tmp_path / "crashed") == exported(tmp_path / "whole")
    assert_equal_state(weights(tmp_path / "crashed"), weights(tmp_path / "whole"))
    assert decided(tmp_path / "crashed") == decided(tmp_path / "whole")
    histories = decided(tmp_path / "whole")
    assert {entry["decision"] for entry in histories["AccuracyGuard"]} >= {"hold", "return"}
    assert histories["StructuralPruning"][-1]["level"] > 0
