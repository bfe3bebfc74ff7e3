#!/usr/bin/env python3
"""Check and measure the models in this directory; needs only Python, numpy and onnxruntime.

    python3 run.py                       verify, compare with the expected outputs, time; prints JSON
    python3 run.py --public-key key.pem  also verify the signature (needs `cryptography`)

A file that does not match its SHA-256 sum in manifest.json is refused. Exit status: 0 all well, 2 refused,
3 outputs differ from those expected.
"""

# ruff: noqa: T201, B905 (it prints, that is its purpose, and runs on Python 3.8 as well)

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

MANIFEST, SIGNATURE, SAMPLES = "manifest.json", "manifest.json.sig", "samples.npz"
KEY_VARIABLE = "LIGHTNING_PRUNE_KEY"
AGAIN = "baseline, again"
REFUSED, DIFFERS = 2, 3
MANIFEST_LIMIT = 1 << 20  # bytes; a manifest has a few thousand
CHUNK = 1 << 28  # bytes that are encrypted at a time; AES-GCM ends at 2 GiB
SETTLE_RUNS, SETTLE_NS, SLOW_NS = 3, 10_000_000, 250_000_000
OPENINGS = 5
# An ONNX file of one node: MatMulInteger of `a`, uint8 (4, 64), and `b`, int8 (64, 16), to `y`.
PRODUCT = bytes.fromhex(
    "08083a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201675a130a0161120e0a0c080212080a02"
    "08040a0208405a130a0162120e0a0c080312080a0208400a02081062130a0179120e0a0c080612080a0208040a020810"
    "42040a00100d"
)


class RefusedError(Exception):
    """The bundle is not what was signed or summed up."""


def digest(path: Path) -> str:
    """Return the SHA-256 sum of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def verify(folder: Path, public_key: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check every file of a bundle against the manifest, and the manifest against its signature.

    Returns the manifest and what was verified; raises RefusedError.
    """
    manifest, sums, data = read_manifest(folder)
    for name, total in sums.items():
        target = folder / name
        # A bundle is flat: a name that leads elsewhere, on any system, is no name of a file in it.
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise RefusedError(f"{name!r} is outside of the bundle")
        if target.is_symlink():
            raise RefusedError(f"{name} is a link")
        if not target.is_file():
            raise RefusedError(f"{name} is missing")
        if digest(target) != total:
            raise RefusedError(f"{name} does not match its SHA-256 sum")
    return manifest, {"sha256": len(sums), "signature": check_signature(folder, data, public_key)}


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """Read the manifest; returns it, the sum of each file, and its own bytes; raises RefusedError."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            data = file.read(MANIFEST_LIMIT + 1)
        if len(data) > MANIFEST_LIMIT:
            raise RefusedError(f"{MANIFEST} is larger than {MANIFEST_LIMIT} bytes")
        manifest = json.loads(data)
        sums = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
        needed = [SAMPLES, "run.py"]
        for variant in manifest["variants"]:
            variant["name"], float(variant["tolerance"])
            needed += [variant["file"], *variant.get("data", {}).values()]
        unlisted = [name for name in needed if name not in sums]
        list(manifest["batched_inputs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from error
    if unlisted:
        raise RefusedError(f"{MANIFEST} has no sum for {', '.join(map(str, unlisted))}")
    return manifest, sums, data


def check_signature(folder: Path, data: bytes, public_key: str | None) -> str:
    """Check the manifest's Ed25519 signature, if a public key was given."""
    path = folder / SIGNATURE
    if public_key is None:
        return "not checked" if path.exists() else "none"
    if not path.exists():
        raise RefusedError("a public key was given, and the bundle is not signed")
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise RefusedError("checking a signature needs: pip install cryptography") from error
    try:
        key: Any = load_pem_public_key(Path(public_key).read_bytes())
        key.verify(bytes.fromhex(path.read_text().strip()), data)
    except (InvalidSignature, ValueError, TypeError, AttributeError, OSError) as error:
        raise RefusedError(f"the signature does not match the key in {public_key}") from error
    return "verified"


def read_key(key_file: str | None) -> bytes:
    """Return the 32 bytes of the decryption key, from a file or the environment, as hexadecimal digits."""
    text = Path(key_file).read_text() if key_file else os.environ.get(KEY_VARIABLE, "")
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise RefusedError(
            f"the models are encrypted: give 64 hexadecimal digits in {KEY_VARIABLE} or --key-file"
        )
    return key


def decrypted(path: Path, label: str, key: bytes) -> bytes:
    """Return the content of an encrypted file: AES-256-GCM, a nonce of 12 bytes before each chunk."""
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise RefusedError("decrypting a model needs: pip install cryptography") from error
    sealed, size = path.read_bytes(), CHUNK + 28
    count = max(1, -(-len(sealed) // size))
    try:
        return b"".join(
            AESGCM(key).decrypt(part[:12], part[12:], f"{label}|{number}|{count}".encode())
            for number, part in enumerate(sealed[i * size : (i + 1) * size] for i in range(count))
        )
    except (InvalidTag, ValueError) as error:
        raise RefusedError(f"{path.name} cannot be decrypted with this key") from error


def open_variant(folder: Path, variant: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """Open a variant's model in ONNX Runtime on the CPU; an encrypted one never touches the disk."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model: Any = str(folder / variant["file"])
    if variant.get("encrypted"):
        key = read_key(arguments.key_file)
        model = decrypted(folder / variant["file"], variant["name"], key)
        weights = {n: decrypted(folder / f, f"{variant['name']}|{n}", key) for n, f in weights_of(variant)}
        if weights:
            options.add_external_initializers_from_files_in_memory(
                list(weights), list(weights.values()), [len(data) for data in weights.values()]
            )
    return exact_session(model, options)


@lru_cache(maxsize=1)
def sums_overflow() -> bool:
    """Try whether ONNX Runtime adds 8-bit products in 16 bits here, as it does on x86 without VNNI."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    largest = {"a": numpy.full((4, 64), 255, numpy.uint8), "b": numpy.full((64, 16), 127, numpy.int8)}
    try:
        session = onnxruntime.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
        return bool((session.run(None, largest)[0] != 64 * 255 * 127).any())
    except Exception:  # noqa: BLE001 - its own classes are private
        return True  # a build without this operator: slow is better than wrong


def exact_session(model: Any, options: Any) -> Any:
    """Open a session whose 8-bit sums do not overflow, and which is no slower than that takes."""
    import onnxruntime

    if not sums_overflow():
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    options.add_session_config_entry("session.x64quantprecision", "1")
    said, options.log_severity_level = options.log_severity_level, 4
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - its own classes are private
        # ONNX Runtime 1.32 cannot where operators share a weight: then a static file runs in float.
        options.log_severity_level = said
        options.add_session_config_entry("session.x64quantprecision", "0")
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def weights_of(variant: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the name that a model over 2 GiB has for its weights, and the file they are in."""
    return [(str(name), str(file)) for name, file in variant.get("data", {}).items()]


def load_samples(folder: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sample inputs, and the expected outputs of each variant."""
    import numpy

    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {name: {} for name in names}
    with numpy.load(folder / SAMPLES, allow_pickle=False) as data:
        for key in data.files:
            kind, _, rest = key.partition("|")
            if kind == "input":
                inputs[rest] = data[key]
            else:
                variant, _, output = rest.partition("|")
                outputs.setdefault(variant, {})[output] = data[key]
    return inputs, outputs


def compare(
    session: Any, inputs: dict[str, Any], expected: dict[str, Any], tolerance: float
) -> dict[str, Any]:
    """Return how far a session's outputs are from those expected, relative to their largest magnitude."""
    import numpy

    names = [output.name for output in session.get_outputs()]
    worst_abs = worst_rel = 0.0
    for name, got in zip(names, session.run(None, inputs)):
        wanted = numpy.asarray(expected[name], dtype=numpy.float64)
        got = numpy.asarray(got, dtype=numpy.float64)
        if got.shape != wanted.shape or not numpy.array_equal(numpy.isfinite(got), numpy.isfinite(wanted)):
            return {"max_abs": None, "max_rel": None, "tolerance": tolerance, "ok": False}
        finite = numpy.isfinite(wanted)
        if finite.any():
            difference = float(numpy.abs(got[finite] - wanted[finite]).max())
            scale = float(numpy.abs(wanted[finite]).max())
            worst_abs = max(worst_abs, difference)
            worst_rel = max(worst_rel, difference / scale if scale else difference)
    return {"max_abs": worst_abs, "max_rel": worst_rel, "tolerance": tolerance, "ok": worst_rel <= tolerance}


def time_all(
    opening: dict[str, Callable[[], Any]], inputs: dict[str, Any], rounds: int, seconds: float
) -> dict[str, list[int]]:
    """Time models in turns, in an order shuffled each round; returns nanoseconds by name.

    In equal parts of it all are opened anew, in another order: where one comes to lie in memory makes it up
    to a fifth slower or faster for as long as it is open, and those opened first tend to be slow.
    """
    shuffle = random.Random(0).shuffle
    times: dict[str, list[int]] = {name: [] for name in opening}
    order, parts = list(opening), min(OPENINGS, rounds)
    sessions: dict[str, Any] = {}
    for part in range(1, parts + 1):
        sessions.clear()
        shuffle(order)
        sessions.update((name, opening[name]()) for name in order)
        for session in sessions.values():
            until, runs = time.monotonic() + 0.3 / part, 0
            while time.monotonic() < until or runs < 10:
                session.run(None, inputs)
                runs += 1
        end = time.monotonic() + seconds / parts
        while len(times[order[0]]) < rounds * part / parts:
            shuffle(order)
            for name in order:
                times[name].append(timed_run(partial(sessions[name].run, None, inputs), times[name]))
            if time.monotonic() > end:
                break
    return times


def timed_run(run: Callable[[], object], before: list[int]) -> int:
    """Time a model's next run in nanoseconds; `before` are its times so far.

    In turns, another model has just filled the caches with its own weights, as on no device: an 8-bit model
    then takes up to twice as long. Some untimed runs bring its own back; a slow one does that within a run.
    """
    clock = time.perf_counter_ns
    if not before or before[-1] < SLOW_NS:
        end = clock() + SETTLE_NS
        for _ in range(SETTLE_RUNS):
            run()
            if clock() > end:
                break
    start = clock()
    run()
    return clock() - start


def summarize(times: list[int]) -> dict[str, Any]:
    """Return milliseconds; p90 from 100 runs on, p99 from 1,000."""
    ordered, n = sorted(times), len(times)

    def quantile(q: float) -> float:
        position = q * (n - 1)
        low = int(position)
        high = min(low + 1, n - 1)
        return (ordered[low] + (ordered[high] - ordered[low]) * (position - low)) / 1e6

    return {
        "p50": quantile(0.5),
        "p90": quantile(0.9) if n >= 100 else None,
        "p99": quantile(0.99) if n >= 1000 else None,
        "mean": sum(ordered) / n / 1e6,
        "runs": n,
        "min": ordered[0] / 1e6,
    }


def peak_kib() -> int | None:
    """Return the peak resident memory of this process, or None where the system does not tell it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def memory_of(folder: Path, variant: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """Run a model in a fresh process and return its peak memory beyond the imports, in bytes, or None."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", variant["name"]]
    command += ["--folder", str(folder), "--threads", str(arguments.threads)]
    command += ["--key-file", arguments.key_file] if arguments.key_file else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=600)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return None


def print_memory(folder: Path, variant: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Be the fresh process that `memory_of` starts."""
    import onnxruntime  # noqa: F401 (its own memory is not the model's)

    inputs, _ = load_samples(folder, [])
    one = single(inputs, arguments.batched)
    before = peak_kib()
    session = open_variant(folder, variant, arguments)
    for _ in range(3):
        session.run(None, one)
    after = peak_kib()
    print(json.dumps(None if before is None or after is None else (after - before) * 1024))


def single(inputs: dict[str, Any], batched: list[str]) -> dict[str, Any]:
    """Cut the samples to batch 1."""
    return {name: array[:1] if name in batched else array for name, array in inputs.items()}


def environment() -> dict[str, Any]:
    """Say where this runs."""
    import numpy
    import onnxruntime

    def read(path: str) -> str | None:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return None

    lines = (read("/proc/cpuinfo") or "").splitlines()
    model = next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith(("model name", "Hardware"))), None
    )
    flags = next((x.split(":", 1)[1].split() for x in lines if x.startswith(("flags", "Features"))), [])
    return {
        "machine": platform.machine(),
        "instruction_sets": [x for x in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if x in flags],
        "system": platform.platform(),
        "cpu": model or platform.processor(),
        "board": (read("/proc/device-tree/model") or "").strip("\0") or None,
        "cpus": os.cpu_count(),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def pin(threads: int) -> list[int] | None:
    """Keep the process on as many cores as it has threads, where the system can do so."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        return None
    return cores


def measure(
    folder: Path, manifest: dict[str, Any], verified: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], int]:
    """Do all that the module's docstring says; returns the result and the exit status."""
    pinned = pin(arguments.threads)
    variants = manifest["variants"]
    inputs, expected = load_samples(folder, [variant["name"] for variant in variants])
    one = single(inputs, manifest["batched_inputs"])
    opening: dict[str, Callable[[], Any]] = {
        variant["name"]: partial(open_variant, folder, variant, arguments) for variant in variants
    }
    results = []
    for variant in variants:
        parity = compare(opening[variant["name"]](), inputs, expected[variant["name"]], variant["tolerance"])
        results.append({"name": variant["name"], "parity": parity})
    again = None
    if arguments.rounds:
        opening[AGAIN] = opening[variants[0]["name"]]
        times = time_all(opening, one, arguments.rounds, arguments.seconds)
        for variant, result in zip(variants, results):
            result["latency_ms"] = summarize(times[variant["name"]])
            result["peak_memory_bytes"] = memory_of(folder, variant, arguments)
        again = summarize(times[AGAIN])["p50"] / summarize(times[variants[0]["name"]])["p50"]
    status = 0 if all(result["parity"]["ok"] for result in results) else DIFFERS
    return {
        "schema": 1, "ok": status == 0, "verified": verified, "variants": results, "again": again,
        "noisy": None if again is None else abs(again - 1) > 0.05, "threads": arguments.threads,
        "pinned": pinned, "environment": environment(),
    }, status  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=str(Path(__file__).resolve().parent), help="the bundle")
    parser.add_argument(
        "--rounds", type=int, default=200, help="rounds to time; 0 only verifies and compares"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long to time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--public-key", help="PEM file of the Ed25519 public key")
    parser.add_argument("--key-file", help=f"file with the decryption key, else {KEY_VARIABLE}")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parse(argv)
    folder = Path(arguments.folder)
    try:
        if arguments.memory_of:
            manifest = json.loads((folder / MANIFEST).read_text())
            arguments.batched = manifest["batched_inputs"]
            variant = next(v for v in manifest["variants"] if v["name"] == arguments.memory_of)
            print_memory(folder, variant, arguments)
            return 0
        manifest, verified = verify(folder, arguments.public_key)
        result, status = measure(folder, manifest, verified, arguments)
    except RefusedError as error:
        print(json.dumps({"schema": 1, "ok": False, "refused": str(error)}))
        return REFUSED
    print(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
