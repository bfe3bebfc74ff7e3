"""The `lightning-prune` command as a user types it, on the quickstart's config made small."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from processes import run_python

from lightning_prune.cli import namespace

ROOT = Path(__file__).parents[2]
SMALL = ["--trainer.max_epochs=3", "--model.width=8"]


def command(*words, cwd):
    return run_python("-m", "lightning_prune", *words, cwd=cwd, env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(ROOT / "examples" / "digits", folder / "digits")
    text = (folder / "digits" / "config.yaml").read_text()
    there = "dirpath: runs/digits/edge"
    assert there in text
    (folder / "digits" / "untimed.yaml").write_text(text.replace(there, f"profile: null\n        {there}"))
    done = command("fit", "--config", "digits/config.yaml", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.fixture
def report(fitted):
    return json.loads((fitted[0] / "runs" / "digits" / "edge" / "report.json").read_text())


def test_fit_ends_with_a_table_and_a_report_of_three_variants(fitted, report):
    assert [variant["name"] for variant in report["variants"]] == ["dense", "pruned", "pruned.int8"]
    for words in ("File size", "MACs", "Latency p50", "Peak memory", "pruned.int8", "val_acc"):
        assert words in fitted[1]


def test_the_files_carry_the_configs_note_on_their_inputs(fitted):
    edge = fitted[0] / "runs" / "digits" / "edge"
    for path in edge.glob("*.onnx"):
        notes = {item.key: item.value for item in onnx.load(path).metadata_props}
        assert notes["normalization"] == "grey values from 0 to 1", path.name


def test_fit_meets_its_budgets(report):
    dense, pruned = report["variants"][:2]
    assert pruned["macs"] <= dense["macs"] / 2
    assert pruned["nonzero"] <= 0.42 * pruned["parameters"]


def test_export_of_the_checkpoint_gives_the_same_files(fitted):
    folder, _ = fitted
    last = "runs/digits/checkpoints/last.ckpt"
    words = ["--ckpt_path", last, "--dirpath", "again"]
    done = command("export", "--config", "digits/untimed.yaml", *SMALL, *words, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("dense.onnx", "pruned.onnx", "pruned.int8.onnx"):
        assert (folder / "again" / name).read_bytes() == (folder / "runs/digits/edge" / name).read_bytes()
    compared = command("compare", "runs/digits/edge", "again", cwd=folder)
    assert compared.returncode == 0, compared.stderr[-2000:]
    assert "again" in compared.stdout


def test_export_without_a_checkpoint_says_what_to_add(fitted):
    done = command("export", "--config", "digits/config.yaml", cwd=fitted[0])
    assert done.returncode == 1
    assert "--ckpt_path" in done.stderr


def test_a_checkpoint_brings_the_arguments_its_module_was_made_with(fitted):
    folder, _ = fitted
    words = ["--ckpt_path", "runs/digits/checkpoints/last.ckpt", "--dirpath", "without"]
    done = command("export", "--config", "digits/untimed.yaml", *words, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("dense.onnx", "pruned.onnx"):
        assert (folder / "without" / name).read_bytes() == (folder / "runs/digits/edge" / name).read_bytes()


def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(fitted):
    (fitted[0] / "text.ckpt").write_text("hello")
    words = ["--config", "digits/config.yaml", "--ckpt_path", "text.ckpt"]
    done = command("export", *words, cwd=fitted[0])
    assert done.returncode == 1
    assert "CheckpointError: text.ckpt cannot be read as a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_names_what_can_be_pruned_and_what_cannot(fitted):
    done = command("inspect", "--config", "digits/config.yaml", cwd=fitted[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "its channels are an output of the" in " ".join(done.stdout.split())
    assert "smallest possible" in done.stdout
    assert "blocks.2.conv2.weight" in done.stdout


def test_profile_measures_files_and_writes_json(fitted):
    edge = fitted[0] / "runs" / "digits" / "edge"
    done = command("profile", "dense.onnx", "pruned.onnx", "--max_seconds=3", "--json=p.json", cwd=edge)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((edge / "p.json").read_text())
    assert [variant["name"] for variant in found["variants"]] == ["dense", "pruned"]


def test_profile_of_a_missing_file_fails_in_one_sentence(tmp_path):
    done = command("profile", "nothing.onnx", cwd=tmp_path)
    assert done.returncode == 1
    assert "nothing.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_layer_name_fails_before_training_and_names_the_nearest(fitted):
    words = ["--trainer.callbacks+=lightning_prune.MagnitudePruning", "--trainer.callbacks.include=[bloks.*]"]
    done = command("fit", "--config", "digits/config.yaml", *SMALL, *words, cwd=fitted[0])
    assert done.returncode == 1
    assert "Did you mean 'blocks'" in done.stderr


def test_a_module_of_the_other_namespace_is_trained_by_its_own_lightning(tmp_path):
    text = (ROOT / "examples" / "digits" / "digits.py").read_text()
    (tmp_path / "digits.py").write_text(text.replace("from pytorch_lightning", "from lightning.pytorch"))
    config = (ROOT / "examples" / "digits" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("pytorch_lightning.", "lightning.pytorch."))
    words = ["fit", "--config", "config.yaml", *SMALL, "--trainer.fast_dev_run=true"]
    # Where nothing has imported the first namespace yet.
    line = [sys.executable, "-m", "lightning_prune", *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_namespace_is_that_of_the_model():
    other = "lightning.pytorch.demos.boring_classes.BoringModel"
    assert namespace(["fit", f"--model={other}"], []) == "lightning.pytorch"
    assert namespace(["fit", "--model.class_path", other], []) == "lightning.pytorch"
    assert namespace(["fit", "--model=no.such.Model"], []) == "pytorch_lightning"
