"""A directory that runs on a device with Python, numpy and onnxruntime only, and shows if it was changed.

Beside the models lie a few real inputs with the outputs they gave here, a manifest of SHA-256 sums, and one
program, `run.py`, that verifies, compares, times, and prints JSON. A bundle can be sealed: its manifest
signed with Ed25519, its models encrypted with AES-256-GCM. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.deploy import bundle_runner
from lightning_prune.deploy.files import appearing, staged, write_whole
from lightning_prune.deploy.runtime import Feed, open_session
from lightning_prune.deploy.storage import data_files
from lightning_prune.errors import ConfigurationError, ExportError, MissingDependencyError

MANIFEST, SIGNATURE, SAMPLES = bundle_runner.MANIFEST, bundle_runner.SIGNATURE, bundle_runner.SAMPLES
RUNNER = "run.py"
SCHEMA = 1
SAMPLE_COUNT = 4
# How far a device may be from the outputs computed here, relative to their largest magnitude: other
# processors round float sums otherwise, and a step of 8 bits can tip over.
FLOAT_TOLERANCE, INTEGER_TOLERANCE = 1e-3, 5e-2


def write_bundle(
    dirpath: str | Path,
    models: Mapping[str, str],
    inputs: Feed,
    batched: Sequence[str],
    also: Sequence[str] = (),
) -> Path:
    """Make a bundle of a directory that holds models: samples, runner and manifest.

    Args:
        dirpath: The directory.
        models: The file name of each variant, the baseline first.
        inputs: Real inputs by name, shape (samples, ...) for those that have a batch.
        batched: The inputs whose first axis is the batch.
        also: Other files of the directory that belong to the bundle.

    Returns:
        The path of the manifest.

    Raises:
        OutputError: A file cannot be written.
    """
    folder = Path(dirpath)
    few = {k: v[:SAMPLE_COUNT] if k in batched else v for k, v in inputs.items()}
    arrays = {f"input|{name}": array for name, array in few.items()}
    variants: list[dict[str, Any]] = []
    for name, file in models.items():
        session = open_session(folder / file, threads=1)
        results = session.run(None, few)
        for output, array in zip(session.get_outputs(), results, strict=True):
            arrays[f"output|{name}|{output.name}"] = np.asarray(array)
        integer = name.endswith(".int8")
        variants.append(
            {"name": name, "file": file, "tolerance": INTEGER_TOLERANCE if integer else FLOAT_TOLERANCE}
        )
        weights = {part.name: part.name for part in data_files(folder / file)}
        variants[-1].update({"data": weights} if weights else {})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_whole(folder / SAMPLES, buffer.getvalue())
    write_whole(folder / RUNNER, Path(bundle_runner.__file__).read_bytes())
    facts = {"variants": variants, "batched_inputs": list(batched)}
    return write_manifest(folder, facts, [*_files_of(variants), SAMPLES, RUNNER, *also])


def _files_of(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for v in variants for name in (v["file"], *v.get("data", {}).values())]


def write_manifest(folder: Path, facts: Mapping[str, Any], names: Sequence[str]) -> Path:
    """Write the sums of files in a directory, and facts about them; reports beside them may change."""
    files = {}
    for name in sorted(names):
        path = folder / name
        files[name] = {"sha256": bundle_runner.digest(path), "bytes": path.stat().st_size}
    text = json.dumps({"schema": SCHEMA, **facts, "files": files}, indent=2) + "\n"
    return write_whole(folder / MANIFEST, text.encode())


def verify_bundle(dirpath: str | Path, public_key: str | Path | None = None) -> dict[str, Any]:
    """Check every file of a bundle against its sum, and the signature if a key is given.

    Args:
        dirpath: The bundle.
        public_key: A PEM file of an Ed25519 public key.

    Returns:
        The manifest.

    Raises:
        ExportError: A file is missing or changed, or the signature does not match.
    """
    try:
        manifest, _ = bundle_runner.verify(Path(dirpath), None if public_key is None else str(public_key))
    except bundle_runner.RefusedError as error:
        raise ExportError(f"The bundle in {dirpath} is refused: {error}.") from error
    return dict(manifest)


def seal_bundle(
    dirpath: str | Path,
    target: str | Path,
    *,
    private_key: str | Path | None = None,
    encrypt: bool = False,
    key_file: str | Path | None = None,
) -> Path:
    """Copy a bundle, with its models encrypted and its manifest signed.

    Args:
        dirpath: The bundle; it is verified first.
        target: The directory of the sealed one; the reports stay behind.
        private_key: A PEM file of an Ed25519 private key (`openssl genpkey -algorithm ed25519`) to sign with.
        encrypt: Whether to encrypt the models.
        key_file: A file with the key, 64 hexadecimal digits; else the variable `LIGHTNING_PRUNE_KEY`.

    Returns:
        The path of the sealed bundle.

    Raises:
        ConfigurationError: A key is missing or malformed.
        ExportError: The bundle was changed.
        OutputError: A file cannot be written.
    """
    source = Path(dirpath)
    manifest = verify_bundle(source)
    if not encrypt and private_key is None:
        raise ConfigurationError("seal_bundle: give private_key=... to sign, or encrypt=True.")
    signer = None if private_key is None else _signer(private_key)
    key = _encryption_key(key_file) if encrypt else None
    variants = []
    with staged(target, last=MANIFEST) as stage:
        for variant in manifest["variants"]:
            if key is not None:
                variant = _encrypt(source, stage, variant, key)
            else:
                for name in _files_of([variant]):
                    _copy(source / name, stage / name)
            variants.append(variant)
        for name in (SAMPLES, RUNNER):
            _copy(source / name, stage / name)
        facts = {k: v for k, v in manifest.items() if k not in ("schema", "files")} | {"variants": variants}
        path = write_manifest(stage, facts, [*_files_of(variants), SAMPLES, RUNNER])
        if signer is not None:
            write_whole(stage / SIGNATURE, signer.sign(path.read_bytes()).hex().encode())
    return Path(target)


def archive_bundle(dirpath: str | Path, path: str | Path | None = None) -> Path:
    """Pack a bundle into one `.tar.gz`, the same bytes for the same files.

    Args:
        dirpath: The bundle; it is verified first.
        path: The archive; beside the directory by default.

    Returns:
        The path of the archive.

    Raises:
        ExportError: The bundle was changed.
        OutputError: The archive cannot be written.
    """
    folder = Path(dirpath)
    names = [*verify_bundle(folder)["files"], MANIFEST]
    names += [SIGNATURE] if (folder / SIGNATURE).exists() else []
    target = Path(path) if path is not None else folder.with_name(f"{folder.name}.tar.gz")
    with (
        appearing(target) as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(names):
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size, entry.mode = (folder / name).stat().st_size, 0o755 if name == RUNNER else 0o644
            with (folder / name).open("rb") as source:
                archive.addfile(entry, source)
    return target


def _cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.of("cryptography", "sealing a bundle", "cryptography") from error


def _signer(path: str | Path) -> Any:
    _cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    expected = "the PEM file of an Ed25519 private key without a password"
    remedy = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"
    try:
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError.of("seal_bundle", "private_key", expected, str(path), remedy) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError.of("seal_bundle", "private_key", expected, str(path), remedy)
    return key


def _encryption_key(path: str | Path | None) -> bytes:
    _cryptography()
    if path is None and bundle_runner.KEY_VARIABLE not in os.environ:
        raise ConfigurationError(
            f"seal_bundle: to encrypt, put 64 hexadecimal digits into {bundle_runner.KEY_VARIABLE} or a "
            "`key_file`; make them with `openssl rand -hex 32`."
        )
    try:
        return bundle_runner.read_key(None if path is None else str(path))
    except (bundle_runner.RefusedError, OSError) as error:
        # The message never repeats what was read.
        raise ConfigurationError("seal_bundle: the key must be 64 hexadecimal digits.") from error


def _encrypt(source: Path, target: Path, variant: Mapping[str, Any], key: bytes) -> dict[str, Any]:
    """Encrypt a variant's files, each under a label of its own, so that none can take another's place."""
    name, file = variant["name"], variant["file"]
    plain = {name: file, **{f"{name}|{weights}": weights for weights in variant.get("data", {})}}
    for label, part in plain.items():
        _seal(source / part, target / f"{part}.enc", key, label)
    data = {"data": {weights: f"{weights}.enc" for weights in variant["data"]}} if "data" in variant else {}
    return {**variant, "file": f"{file}.enc", "encrypted": "AES-256-GCM", **data}


def _seal(source: Path, target: Path, key: bytes, label: str) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    count = max(1, ceil(source.stat().st_size / bundle_runner.CHUNK))
    with source.open("rb") as plain, appearing(target) as sealed:
        for number in range(count):
            nonce = secrets.token_bytes(12)
            part = plain.read(bundle_runner.CHUNK)
            sealed.write(nonce + AESGCM(key).encrypt(nonce, part, f"{label}|{number}|{count}".encode()))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, appearing(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
