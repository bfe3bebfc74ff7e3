"""A short run of the accuracy benchmark, on real data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"
DATA = Path(os.environ.get("LIGHTNING_PRUNE_DATA", "no data"))
MISSING = "no folder LIGHTNING_PRUNE_DATA; benchmarks/data.py says where to get what belongs there"


@pytest.mark.skipif(not DATA.is_dir(), reason=MISSING)
def test_each_kind_of_method_ends_in_the_table_with_what_it_was_asked_for(tmp_path: Path) -> None:
    methods = ["dense", "magnitude", "structural"]
    subprocess.run(
        [sys.executable, SCRIPT, "keywords", "--epochs", "4", "--work", tmp_path / "work",
         "--methods", *methods, "--data-root", DATA],
        env={**os.environ, "LIGHTNING_PRUNE_RESULTS": str(tmp_path)}, check=True, timeout=600,
    )  # fmt: skip
    found = json.loads((tmp_path / "accuracy_keywords.json").read_text(encoding="utf-8"))["results"]
    files = {title.partition(",")[0]: runs[0]["float"] for title, runs in found.items()}
    assert sorted(files) == sorted(methods)
    # Its biases, a twentieth of this network, are no weights that can be zero.
    assert 0.75 < 1 - files["magnitude"]["nonzero"] / files["magnitude"]["parameters"] < 0.8
    assert 0.45 < files["structural"]["macs"] / files["dense"]["macs"] <= 0.5
    # The published network has 90 % at least; four epochs bring back most of what was taken.
    assert files["dense"]["score"] > 0.9
    assert files["structural"]["score"] > 0.85
    assert files["magnitude"]["score"] > 0.6
