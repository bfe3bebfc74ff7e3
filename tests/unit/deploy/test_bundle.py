from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from lightning_prune.deploy import bundle_runner
from lightning_prune.deploy.bundle import (
    MANIFEST,
    SIGNATURE,
    archive_bundle,
    seal_bundle,
    verify_bundle,
    write_bundle,
)
from lightning_prune.deploy.environment import instruction_sets
from lightning_prune.deploy.quantize import Quantize, quantize_file
from lightning_prune.errors import ConfigurationError, ExportError

KEY = "00112233445566778899aabbccddeeff" * 2
MODELS = {"dense": "dense.onnx", "dense.int8": "dense.int8.onnx"}


@pytest.fixture(scope="module")
def made(sparse_chain, tmp_path_factory):
    """A bundle of a float and a quantized file."""
    _, exported, feeds = sparse_chain
    folder = tmp_path_factory.mktemp("made") / "edge"
    folder.mkdir()
    shutil.copy(exported.path, folder / "dense.onnx")
    quantize_file(exported.path, folder / "dense.int8.onnx", Quantize(), feeds)
    (folder / "report.json").write_text("{}")
    write_bundle(folder, MODELS, feeds[0], ["input"])
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(made, tmp_path / "edge")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A key pair, made by another program."""
    pytest.importorskip("cryptography", reason="sealing is an extra")
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make keys with")
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "private.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def run(folder, *arguments, env=None):
    """Run the bundle in an isolated interpreter that does not know this package's directory."""
    command = [sys.executable, "-I", str(folder / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=env)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_files_are_opened_anew_in_other_orders_while_they_are_timed():
    opened = []

    class Session:
        def run(self, outputs, inputs):
            pass

    def opening(name):
        return lambda: opened.append(name) or Session()

    times = bundle_runner.time_all({name: opening(name) for name in "abcd"}, {}, rounds=20, seconds=20)
    orders = ["".join(opened[first : first + 4]) for first in range(0, len(opened), 4)]
    assert len(orders) == bundle_runner.OPENINGS
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1
    assert {name: len(measured) for name, measured in times.items()} == dict.fromkeys("abcd", 20)


def test_the_manifest_sums_up_what_runs_and_the_reports_may_change(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["dense.int8.onnx", "dense.onnx", "run.py", "samples.npz"]
    for name, entry in manifest["files"].items():
        data = (bundle / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (bundle / "report.json").write_text('{"new": 1}')
    assert verify_bundle(bundle) == manifest


def test_the_runner_verifies_compares_and_times(bundle):
    status, result = run(bundle, "--rounds", 120, "--seconds", 20)
    assert status == 0
    assert result["ok"] is True
    assert result["verified"] == {"sha256": 4, "signature": "none"}
    assert [v["name"] for v in result["variants"]] == list(MODELS)
    for variant in result["variants"]:
        assert variant["parity"]["ok"]
        assert variant["parity"]["max_rel"] < 1e-6
        latency = variant["latency_ms"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"]
        assert latency["p99"] is None
        assert latency["runs"] == 120
        assert variant["peak_memory_bytes"] > 0
    assert result["again"] > 0
    assert result["environment"]["onnxruntime"]
    assert result["environment"]["instruction_sets"] == [
        name for name in instruction_sets() if name in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8")
    ]


@pytest.mark.parametrize(
    ("took_ms", "runs"), [((1, 1), [4, 4]), ((6, 6), [3, 3]), ((30, 30), [2, 2]), ((300, 300), [2, 1])]
)
def test_a_model_runs_until_the_caches_are_its_own_and_is_timed_then(monkeypatch, took_ms, runs):
    now = [0]
    monkeypatch.setattr(bundle_runner.time, "perf_counter_ns", lambda: now[0])
    counts, times = [], []
    for each in took_ms:
        counts.append(0)

        def run(each=each):
            counts[-1] += 1
            now[0] += each * 1_000_000

        times.append(bundle_runner.timed_run(run, times))
    assert counts == runs
    assert times == [each * 1_000_000 for each in took_ms]


def test_the_runner_needs_only_the_standard_library_numpy_and_onnxruntime(bundle):
    code = f"""
import runpy, sys
sys.argv = ["run.py", "--rounds", "3"]
try:
    runpy.run_path({str(bundle / "run.py")!r}, run_name="__main__")
finally:
    tops = {{name.split(".")[0] for name in sys.modules}}
    foreign = tops & {{"torch", "lightning_prune", "onnx", "pytorch_lightning", "lightning", "cryptography"}}
    print(sorted(foreign))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("file", ["dense.onnx", "dense.int8.onnx", "samples.npz", "run.py"])
def test_one_changed_bit_is_refused_by_the_device_and_here(bundle, file):
    data = bytearray((bundle / file).read_bytes())
    position = data.index(b"Check and") if file == "run.py" else len(data) // 2
    data[position] ^= 1
    (bundle / file).write_bytes(data)
    status, result = run(bundle)
    assert status == 2
    assert result["refused"] == f"{file} does not match its SHA-256 sum"
    with pytest.raises(ExportError, match=f"refused: {file} does not match"):
        verify_bundle(bundle)
    with pytest.raises(ExportError, match="refused"):
        archive_bundle(bundle)


def edit(bundle, change):
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].pop("dense.onnx"), "manifest.json has no sum for dense.onnx"),
        (lambda m: m["files"].update({"../x": {"sha256": "0"}}), "'../x' is outside of the bundle"),
        (lambda m: m["files"].update({"/etc/passwd": {"sha256": "0"}}), "'/etc/passwd' is outside"),
        (lambda m: m["files"].update({"gone": {"sha256": "0"}}), "gone is missing"),
        (lambda m: m.pop("files"), "manifest.json cannot be read"),
        (lambda m: m["files"].update({"sub/x": {"sha256": "0"}}), "'sub/x' is outside of the bundle"),
        (lambda m: m["files"].update({"..\\x": {"sha256": "0"}}), "is outside of the bundle"),
        (lambda m: m["files"].update({"C:x": {"sha256": "0"}}), "'C:x' is outside of the bundle"),
        (lambda m: m["files"].update({".": {"sha256": "0"}}), "'.' is outside of the bundle"),
        (lambda m: m["variants"][0].update(file="../dense.onnx"), "has no sum for ../dense.onnx"),
        (lambda m: m["variants"][0].update(data={"a": "../w"}), "has no sum for ../w"),
        (lambda m: m["files"].update({"dense.onnx": "0"}), "manifest.json cannot be read: TypeError"),
        (lambda m: m.update(files=[1]), "manifest.json cannot be read: AttributeError"),
        (lambda m: m.update(variants=[{"file": ["dense.onnx"]}]), "manifest.json cannot be read: KeyError"),
        (lambda m: m["variants"][0].update(tolerance="x"), "manifest.json cannot be read: ValueError"),
        (lambda m: m.pop("batched_inputs"), "manifest.json cannot be read: KeyError"),
        (lambda m: m.update(note="x" * 2**20), "manifest.json is larger than 1048576 bytes"),
    ],
    ids=[
        "no sum", "outside", "absolute", "missing", "malformed", "folder", "backslash", "drive", "dot",
        "model outside", "weights outside", "no entry", "list", "no name", "text", "no batch", "huge",
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_hold_is_refused(bundle, change, message):
    edit(bundle, change)
    with pytest.raises(ExportError, match="refused") as caught:
        verify_bundle(bundle)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '"text"', "[]", "\xff", "", '{"files": {}, "variants": [], "files": null}'],
    ids=["deep", "text", "list", "no utf-8", "empty", "null"],
)  # fmt: skip
def test_a_manifest_that_is_no_manifest_is_refused_by_the_device_and_here(bundle, text):
    (bundle / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ExportError, match=r"manifest.json (cannot be read|has no sum)"):
        verify_bundle(bundle)
    assert run(bundle)[0] == 2


def test_a_link_is_refused_even_if_what_it_leads_to_matches(bundle, tmp_path):
    (bundle / "dense.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle / "dense.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert run(bundle)[1]["refused"] == "dense.onnx is a link"
    with pytest.raises(ExportError, match="is a link"):
        archive_bundle(bundle)


def test_a_bundle_that_was_cut_off_on_its_way_is_refused_or_not_unpacked(bundle, tmp_path):
    data = archive_bundle(bundle).read_bytes()
    for number, size in enumerate((len(data) // 3, len(data) * 9 // 10)):
        folder = tmp_path / f"there{number}"
        folder.mkdir()
        (folder / "cut.tar.gz").write_bytes(data[:size])
        done = subprocess.run(["tar", "-xzf", "cut.tar.gz"], cwd=folder, capture_output=True, check=False)
        assert done.returncode != 0
        if (folder / "edge" / "run.py").exists():
            assert run(folder / "edge")[0] == 2


def test_a_samples_file_with_pickled_objects_is_not_loaded(bundle):
    np.savez(bundle / "samples.npz", **{"input|input": np.array([{"a": 1}], dtype=object)})
    total = hashlib.sha256((bundle / "samples.npz").read_bytes()).hexdigest()
    edit(bundle, lambda m: m["files"]["samples.npz"].update({"sha256": total}))
    done = subprocess.run([sys.executable, "-I", str(bundle / "run.py")], capture_output=True, text=True)
    assert done.returncode not in (0, 2, 3)
    assert "allow_pickle=False" in done.stderr


def test_outputs_that_differ_are_told_and_exit_with_three(bundle):
    with np.load(bundle / "samples.npz") as data:
        arrays = {k: v + (0.5 if k.startswith("output|dense|") else 0) for k, v in data.items()}
    np.savez(bundle / "samples.npz", **arrays)
    total = hashlib.sha256((bundle / "samples.npz").read_bytes()).hexdigest()
    edit(bundle, lambda m: m["files"]["samples.npz"].update({"sha256": total}))
    status, result = run(bundle, "--rounds", 0)
    assert status == 3
    assert [v["parity"]["ok"] for v in result["variants"]] == [False, True]
    assert "latency_ms" not in result["variants"][0]


def test_a_signed_bundle_is_verified_with_its_key_only(bundle, tmp_path, keys):
    private, public = keys
    sealed = seal_bundle(bundle, tmp_path / "sealed", private_key=private)
    assert not (sealed / "report.json").exists()
    assert run(sealed, "--rounds", 0)[1]["verified"]["signature"] == "not checked"
    status, result = run(sealed, "--rounds", 0, "--public-key", public)
    assert (status, result["verified"]["signature"]) == (0, "verified")
    verify_bundle(sealed, public)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "o"], check=True)
    subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "o", "-pubout", "-out", tmp_path / "other"], check=True
    )
    status, result = run(sealed, "--public-key", tmp_path / "other")
    assert status == 2
    assert "the signature does not match" in result["refused"]


def test_a_model_and_its_sum_changed_together_are_caught_by_the_signature(bundle, tmp_path, keys):
    sealed = seal_bundle(bundle, tmp_path / "sealed", private_key=keys[0])
    shutil.copy(sealed / "dense.int8.onnx", sealed / "dense.onnx")
    total = hashlib.sha256((sealed / "dense.onnx").read_bytes()).hexdigest()
    edit(sealed, lambda m: m["files"]["dense.onnx"].update({"sha256": total}))
    verify_bundle(sealed)  # the sums alone do hold
    with pytest.raises(ExportError, match="the signature does not match"):
        verify_bundle(sealed, keys[1])
    (sealed / SIGNATURE).unlink()
    with pytest.raises(ExportError, match="the bundle is not signed"):
        verify_bundle(sealed, keys[1])


def test_an_encrypted_bundle_runs_with_its_key_only(bundle, tmp_path, monkeypatch):
    pytest.importorskip("cryptography", reason="sealing is an extra")
    monkeypatch.setenv(bundle_runner.KEY_VARIABLE, KEY)
    sealed = seal_bundle(bundle, tmp_path / "sealed", encrypt=True)
    names = sorted(p.name for p in sealed.iterdir())
    assert names == ["dense.int8.onnx.enc", "dense.onnx.enc", "manifest.json", "run.py", "samples.npz"]
    for name in names:
        assert b"pytorch" not in (sealed / name).read_bytes() or name == "run.py"
        assert KEY.encode() not in (sealed / name).read_bytes()
    clean = {k: v for k, v in os.environ.items() if k != bundle_runner.KEY_VARIABLE}
    status, result = run(sealed, "--rounds", 20, env={**clean, bundle_runner.KEY_VARIABLE: KEY})
    assert status == 0
    assert result["variants"][0]["peak_memory_bytes"] > 0
    status, result = run(sealed, env=clean)
    assert status == 2
    assert "the models are encrypted: give 64 hexadecimal digits" in result["refused"]
    (tmp_path / "wrong").write_text("ff" * 32)
    status, result = run(sealed, "--key-file", tmp_path / "wrong", env=clean)
    assert status == 2
    assert "dense.onnx.enc cannot be decrypted with this key" in result["refused"]


def test_encrypted_models_cannot_be_swapped(bundle, tmp_path, monkeypatch):
    """Even with matching sums: a model decrypts under its own name only."""
    pytest.importorskip("cryptography", reason="sealing is an extra")
    monkeypatch.setenv(bundle_runner.KEY_VARIABLE, KEY)
    sealed = seal_bundle(bundle, tmp_path / "sealed", encrypt=True)
    shutil.copy(sealed / "dense.int8.onnx.enc", sealed / "dense.onnx.enc")
    total = hashlib.sha256((sealed / "dense.onnx.enc").read_bytes()).hexdigest()
    edit(sealed, lambda m: m["files"]["dense.onnx.enc"].update({"sha256": total}))
    status, result = run(sealed, "--rounds", 0)
    assert status == 2
    assert "cannot be decrypted" in result["refused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give private_key"),
        ({"private_key": "missing.pem"}, "`private_key`.*openssl genpkey"),
        ({"encrypt": True}, "put 64 hexadecimal digits into LIGHTNING_PRUNE_KEY"),
        ({"encrypt": True, "key_file": "short"}, "the key must be 64 hexadecimal digits"),
    ],
    ids=["nothing", "no key", "no secret", "short secret"],
)
def test_wrong_keys_are_refused_and_never_repeated(bundle, tmp_path, arguments, message, monkeypatch):
    pytest.importorskip("cryptography", reason="sealing is an extra")
    monkeypatch.delenv(bundle_runner.KEY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abcdef")
    with pytest.raises(ConfigurationError, match=message) as caught:
        seal_bundle(bundle, tmp_path / "sealed", **arguments)
    assert "abcdef" not in str(caught.value)
    assert not (tmp_path / "sealed").exists()


def test_the_archive_is_the_same_for_the_same_files_and_runs_where_it_is_unpacked(bundle, tmp_path):
    one = archive_bundle(bundle).read_bytes()
    assert (tmp_path / "edge.tar.gz").read_bytes() == one
    assert archive_bundle(bundle, tmp_path / "again.tgz").read_bytes() == one
    with tarfile.open(tmp_path / "edge.tar.gz") as archive:
        assert all(not m.name.startswith(("/", "..")) for m in archive)
        archive.extractall(tmp_path / "there", filter="data")
    status, result = run(tmp_path / "there" / "edge", "--rounds", 0)
    assert (status, result["ok"]) == (0, True)
