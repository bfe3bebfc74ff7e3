"""A bundle goes to another machine and comes back as a column of the report; the machine is a real sshd."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from export_cases import Net, loader
from torch import nn

from lightning_prune import Target, cli, export
from lightning_prune.deploy import latency_table, layer_files
from lightning_prune.deploy.remote import parse_result, run_over_ssh
from lightning_prune.errors import ConfigurationError, ExportError, ProfileError
from lightning_prune.report.device import measurement_of, merge_device
from lightning_prune.report.results import Report

pytestmark = [
    # Lightning 2.6 still uses a name that torch's pytree is giving up.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"),
]
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="OpenSSH server and client are not installed"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """An export whose directory's name needs quoting."""
    folder = tmp_path_factory.mktemp("bundle") / "edge it's"
    export(Net(), folder, dataloaders=loader(1), profile=None)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An sshd of our own on the loopback, for our own user and key."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines itself when root runs it
    lines = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", f"PidFile {folder}/pid"]
    lines += [f"AuthorizedKeysFile {folder}/authorized_keys", "StrictModes no", "UsePAM no"]
    (folder / "config").write_text("\n".join(lines) + "\n")
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", folder / "config"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    options = ["-p", str(port), "-i", str(folder / "user"), "-o", "StrictHostKeyChecking=no"]
    options += ["-o", f"UserKnownHostsFile={folder}/known", "-o", "IdentitiesOnly=yes", "-F", "none"]
    yield f"{getpass.getuser()}@127.0.0.1", options
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)


@needs_sshd
def test_a_device_measures_the_bundle_and_becomes_a_column_of_the_report(bundle, server, tmp_path):
    host, options = server
    folder = shutil.copytree(bundle, tmp_path / "edge")
    result = run_over_ssh(folder, host, python=sys.executable, rounds=120, ssh_options=options)
    assert result["ok"] is True
    report = merge_device(folder, result, "loopback")
    assert report == Report.load(folder)
    (column,) = report.measurements
    assert column.label == "loopback"
    assert set(column.latency_ms) == {"dense", "dense.int8"}
    assert column.latency_ms["dense"].p90 >= column.latency_ms["dense"].p50 > 0
    assert column.peak_memory_bytes["dense"] > 0
    assert column.environment["verified"]["sha256"] == 4
    assert column.reason is None
    for name in ("report.md", "report.html"):
        assert "loopback" in (folder / name).read_text()
    merge_device(folder, result, "loopback")
    merge_device(folder, result, "another")
    assert [m.label for m in Report.load(folder).measurements] == ["loopback", "another"]
    # The bundle itself still verifies, and can go to the next device.
    assert run_over_ssh(folder, host, python=sys.executable, rounds=0, ssh_options=options)["ok"]


@needs_sshd
def test_nothing_is_left_on_the_device(bundle, server):
    host, options = server
    place = Path(tempfile.gettempdir())
    before = set(place.glob("tmp.*"))
    run_over_ssh(bundle, host, python=sys.executable, rounds=0, ssh_options=options)
    assert set(place.glob("tmp.*")) <= before


@needs_sshd
def test_a_device_without_the_runtime_says_what_it_lacks(bundle, server, tmp_path):
    host, options = server
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(
        ProfileError, match=r"gave no result.*No module named.*install numpy and onnxruntime there"
    ):
        run_over_ssh(bundle, host, python=str(tmp_path / "bare" / "bin" / "python"), ssh_options=options)


@needs_sshd
def test_a_connection_that_drops_is_told_as_such(bundle, server, tmp_path):
    host, options = server
    drop = tmp_path / "python"
    # Kill the sshd session that runs this: the connection is gone in mid-run.
    drop.write_text(
        "#!/bin/sh\n"
        "p=$$\n"
        'while name=$(cat /proc/$p/comm); [ "${name#sshd}" = "$name" ]; do\n'
        "  p=$(awk '/^PPid/ {print $2}' /proc/$p/status)\n"
        "done\n"
        "kill -9 $p\n"
        "sleep 5\n"
    )
    drop.chmod(0o755)
    with pytest.raises(ProfileError, match=r"The connection to .* failed or dropped"):
        run_over_ssh(bundle, host, python=str(drop), ssh_options=options)


@needs_sshd
def test_a_port_where_nobody_listens_is_told_as_such(bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        options = ["-p", str(taken.getsockname()[1]), "-F", "none"]
        with pytest.raises(ProfileError, match=r"failed or dropped.*Connection refused"):
            run_over_ssh(bundle, "nobody@127.0.0.1", ssh_options=options)


@needs_sshd
def test_a_device_that_takes_too_long_is_given_up(bundle, server, tmp_path):
    host, options = server
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(0o755)
    with pytest.raises(ProfileError, match="did not answer within 3 s"):
        run_over_ssh(bundle, host, python=str(slow), ssh_options=options, timeout=3)


def test_a_changed_bundle_is_not_even_sent(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "edge")
    with (folder / "dense.onnx").open("ab") as file:
        file.write(b"x")
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh")
    with pytest.raises(ExportError, match=r"dense\.onnx does not match"):
        run_over_ssh(folder, "nobody@127.0.0.1")


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b"])
def test_a_host_that_ssh_would_misread_is_refused(bundle, host):
    with pytest.raises(ConfigurationError, match="`host`"):
        run_over_ssh(bundle, host)


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        ("", 1, "gave no result"),
        ("hello", 0, "gave no result"),
        ('{"schema": 2}', 0, "another version"),
        ('{"schema": 1, "refused": "x does not match"}', 2, "refused the bundle: x does not match"),
        ("", 255, "failed or dropped"),
        ("[" * 100_000, 0, "gave no result"),
        ("x" * 5_000_000, 0, "gave 5000000 characters, which is no result"),
        ("[]", 0, "another version"),
    ],
    ids=["nothing", "no JSON", "another schema", "refused", "dropped", "deep", "huge", "list"],
)
def test_what_is_no_result_is_an_error(output, status, message):
    with pytest.raises(ProfileError, match=message):
        parse_result(output, status, "", "device")


def test_outputs_that_differ_on_the_device_have_no_numbers_but_a_reason():
    latency = {"p50": 1.0, "p90": 2.0, "p99": None, "mean": 1.1, "runs": 100, "min": 0.9}
    variants = [
        {"name": n, "parity": {"ok": ok}, "latency_ms": latency, "peak_memory_bytes": 10}
        for n, ok in (("dense", True), ("pruned.int8", False))
    ]
    result = {"variants": variants, "environment": {}, "threads": 1, "verified": {}, "noisy": False}
    column = measurement_of(result, "pi")
    assert list(column.latency_ms) == ["dense"]
    assert "outputs of pruned.int8 differ on the device" in column.reason
    with pytest.raises(ConfigurationError, match=r"what a bundle's run\.py prints"):
        measurement_of({"variants": [{}]}, "pi")
    for wrong in (
        {"variants": 3},
        {"variants": ["dense"]},
        {"environment": None},
        {"variants": [{**variants[0], "latency_ms": {**latency, "p50": "fast"}}]},
        {"variants": [{**variants[0], "latency_ms": {**latency, "p50": float("nan")}}]},
        {"variants": [{**variants[0], "latency_ms": {**latency, "unknown": 1}}]},
    ):
        with pytest.raises(ConfigurationError, match=r"what a bundle's|finite times"):
            measurement_of({**result, **wrong}, "pi")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command, in this process: starting Python and torch anew takes seconds."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = 0
        try:
            cli.main(list(words))
        except SystemExit as end:
            status = end.code
        return Done(status, *capsys.readouterr())

    return run


@needs_sshd
def test_the_command_profiles_a_device_and_adds_a_column(bundle, server, tmp_path, command):
    host, options = server
    shutil.copytree(bundle, tmp_path / "edge")
    words = ["profile", "--bundle=edge", f"--ssh={host}", f"--python={sys.executable}", "--rounds=20"]
    done = command(*words, "--label=board", f"--ssh_options={shlex.join(options)}")
    assert done.returncode == 0, done.stderr
    assert "board" in done.stdout
    assert [m.label for m in Report.load(tmp_path / "edge").measurements] == ["board"]


def test_a_result_that_came_another_way_becomes_a_column_too(bundle, tmp_path, command):
    folder = shutil.copytree(bundle, tmp_path / "edge")
    runner = [sys.executable, str(folder / "run.py"), "--rounds", "3"]
    printed = subprocess.run(runner, capture_output=True, text=True, check=True).stdout
    (tmp_path / "phone.json").write_text(printed)
    done = command("profile", "--bundle", "edge", "--result", "phone.json")
    assert done.returncode == 0, done.stderr
    assert [m.label for m in Report.load(folder).measurements] == ["phone"]
    done = command("profile", "--bundle", "edge")
    assert done.returncode == 1
    assert "give --ssh user@host or --result FILE" in done.stderr
    done = command("profile", "--bundle", "edge", "--result", "none.json")
    assert "`result` must be a readable file, got 'none.json'" in done.stderr


def test_the_command_verifies_and_packs_a_bundle(bundle, tmp_path, command):
    folder = shutil.copytree(bundle, tmp_path / "edge")
    done = command("bundle", "edge", "--archive")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    assert (tmp_path / "edge.tar.gz").is_file()
    with (folder / "dense.onnx").open("ab") as file:
        file.write(b"x")
    done = command("bundle", "edge")
    assert done.returncode == 1
    assert "refused: dense.onnx does not match its SHA-256 sum" in done.stderr


def test_the_command_signs_and_encrypts_a_copy(bundle, tmp_path, command, monkeypatch):
    pytest.importorskip("cryptography", reason="sealing is an extra")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    shutil.copytree(bundle, tmp_path / "edge")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    monkeypatch.setenv("LIGHTNING_PRUNE_KEY", "ab" * 32)
    done = command("bundle", "edge", "--target=sealed", "--sign=key.pem", "--encrypt")
    assert done.returncode == 0, done.stderr
    assert "ab" * 32 not in done.stdout + done.stderr
    names = sorted(p.name for p in (tmp_path / "sealed").iterdir())
    models = ["dense.int8.onnx.enc", "dense.onnx.enc"]
    assert names == [*models, "manifest.json", "manifest.json.sig", "run.py", "samples.npz"]
    assert "need --target DIRECTORY" in command("bundle", "edge", "--sign=key.pem").stderr


# ------------------------------------------------------------------ timing layers there


@needs_sshd
def test_layers_are_timed_on_the_device_that_is_asked_for(server, tmp_path):
    host, options = server
    device = Target(host, python=sys.executable, ssh_options=options)
    # Large enough to be told from the clock's own unrest: of 3 channels and 8x8 pixels it takes 0.5 us.
    net, sample = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()), (torch.zeros(1, 16, 32, 32),)
    layers = layer_files.observe(net, sample, {})
    times, pace, target = latency_table.measure_layers(layers, {("0.weight", 0)}, device)
    assert target == latency_table.described(Target())  # the loopback is this machine
    assert times["0.weight"]["first"] == [16, 32]
    assert pace > 0
    assert times["0.weight"]["ms"][1][0] > 0
    assert latency_table.measure_networks([net], sample, {}, device)[0] > 0


@needs_sshd
def test_a_device_without_a_runtime_says_what_is_missing(server, tmp_path):
    host, options = server
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    with pytest.raises(
        ProfileError, match=r"Timing layers on .*127\.0\.0\.1 failed: .*No module named 'onnxruntime'"
    ):
        latency_table.described(Target(host, python=str(bare), ssh_options=options))


def test_an_unreachable_device_is_named():
    with pytest.raises(ProfileError, match=r"Timing layers on nobody@127\.0\.0\.1 failed"):
        latency_table.described(Target("nobody@127.0.0.1", ssh_options=["-p", "1"]))


@pytest.mark.parametrize(
    ("argument", "value"), [("host", ""), ("host", "-oProxyCommand=x"), ("host", "a b"), ("threads", 0)]
)
def test_wrong_targets_are_refused(argument, value):
    with pytest.raises(ConfigurationError, match=f"Target: `{argument}` must be"):
        Target(**{argument: value})
