"""The environment says what the system says, and nothing that names a person or a place."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_prune.deploy.environment import environment, instruction_sets, lacks_vnni


def test_machine_and_versions_are_the_systems_own():
    found = environment()
    assert found["cores"] == os.cpu_count()
    assert found["python"].endswith(platform.python_version())
    assert found["packages"]["onnxruntime"] == version("onnxruntime")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="lscpu is the oracle")
def test_instruction_sets_are_those_of_lscpu():
    flags = subprocess.run(
        ["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C", **os.environ}
    )
    line = next(line for line in flags.stdout.splitlines() if line.startswith("Flags:"))
    found = instruction_sets()
    assert set(found) <= set(line.split())
    assert ("avx2" in found) == ("avx2" in line.split())


def test_arm_features_are_read_too():
    assert instruction_sets({"Features": "fp asimd asimddp i8mm"}) == ["asimd", "asimddp", "i8mm"]


@pytest.mark.parametrize(
    ("known", "lacks"),
    [
        ({"arch": "x86_64", "instruction_sets": ["avx", "avx2"]}, True),
        ({"machine": "AMD64", "instruction_sets": ["avx2"]}, True),
        ({"arch": "x86_64", "instruction_sets": ["avx2", "avx_vnni"]}, False),
        ({"arch": "x86_64", "instruction_sets": ["avx512f", "avx512_vnni"]}, False),
        ({"arch": "x86_64", "instruction_sets": []}, False),  # not known
        ({"arch": "aarch64", "instruction_sets": ["asimd"]}, False),
        ({"instruction_sets": None}, False),
    ],
)
def test_only_a_known_x86_processor_without_it_lacks_vnni(known, lacks):
    assert lacks_vnni(known) is lacks


def test_nothing_names_a_host_a_user_or_a_path():
    text = json.dumps(environment())
    assert socket.gethostname() not in text.split('"')
    assert f"{Path.home()}/" not in text
    assert f"/{getpass.getuser()}/" not in text
