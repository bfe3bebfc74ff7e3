"""Two processes cut the same channels and go on as one training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from structural_cases import Net, macs
from structural_ddp import STRATEGIES

from lightning_prune.loading import load_pruned

SCRIPT = Path(__file__).with_name("structural_ddp.py")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def run(folder: Path, *arguments: str, script: str | Path = SCRIPT) -> tuple[int, list[dict], str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), "MASTER_ADDR": "127.0.0.1"}
    env.pop("LOCAL_RANK", None)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    files = sorted(folder.glob("rank*.json"))
    return done.returncode, [json.loads(file.read_text()) for file in files], done.stderr


QUICK = ("manual_static", "joint")  # the others are as slow and find less


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in STRATEGIES
        if name != "unreachable"
    ],
)
def test_ranks_stay_identical_through_every_cut(tmp_path, variant):
    code, ranks, errors = run(tmp_path, variant)
    assert code == 0, errors[-3000:]
    assert "self.log('macs'" not in errors, "Lightning advises to log for all ranks"
    assert len(ranks) == 2
    assert ranks[0]["rows"] == ranks[1]["rows"]
    sizes = [row[1] for row in ranks[0]["rows"]]
    whole = macs(Net())
    assert sizes[0] == whole >= sizes[1] > sizes[2] == sizes[3]
    assert (sizes[1] < whole) == (variant != "activation"), "which has nothing to say in the first epoch"
    assert sizes[3] <= 0.5 * whole
    assert ranks[0]["evidence"] == ranks[1]["evidence"]
    if variant == "recalibrate":  # estimated from the batches of all, though every rank has other ones
        assert ranks[0]["statistics"] == ranks[1]["statistics"]
    digests = [row[2] for row in ranks[0]["rows"]]
    assert len(set(digests)) == 4, "training went on after the last cut"
    assert macs(load_pruned(Net, tmp_path / "last.ckpt")) == sizes[3]


def test_a_budget_out_of_reach_ends_every_rank(tmp_path):
    code, ranks, _ = run(tmp_path, "unreachable")
    assert code != 0
    assert ranks
    assert all("smallest reachable" in rank["error"] for rank in ranks)
