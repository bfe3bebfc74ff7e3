"""The subcommands of `lightning-prune` that deal with bundles and devices."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_prune.deploy.bundle import archive_bundle, seal_bundle, verify_bundle
from lightning_prune.deploy.remote import parse_result, run_over_ssh
from lightning_prune.errors import ConfigurationError
from lightning_prune.report.device import merge_device
from lightning_prune.report.table import print_table


def profile_device(argv: Sequence[str]) -> None:
    """Run a bundle on a device, and add what it measured to the bundle's report.

    Args:
        argv: The command line after `profile`, with `--bundle`.

    Raises:
        ConfigurationError: An option is missing or malformed.
        ProfileError: The device gave no result.
        ExportError: The bundle was changed.
    """
    parser = ArgumentParser(prog="lightning-prune profile", description="Measure a bundle on a device.")
    parser.add_argument("--bundle", type=str, required=True, help="the directory of an export")
    parser.add_argument("--ssh", type=str, help="user@host to push the bundle to and run it on")
    parser.add_argument(
        "--result", type=str, help="or a file with what run.py printed there (adb, serial, ...)"
    )
    parser.add_argument("--label", type=str, help="the title of the report's column; the host by default")
    parser.add_argument("--python", type=str, default="python3", help="the device's Python")
    parser.add_argument("--ssh_options", type=str, default="", help='options of ssh, as in "-p 2222"')
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(list(argv))
    if (given.ssh is None) == (given.result is None):
        raise ConfigurationError("lightning-prune profile --bundle: give --ssh user@host or --result FILE.")
    if given.ssh is not None:
        result = run_over_ssh(
            given.bundle, given.ssh, python=given.python, rounds=given.rounds, seconds=given.seconds,
            threads=given.threads, ssh_options=shlex.split(given.ssh_options),
        )  # fmt: skip
    else:
        try:
            output = Path(given.result).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError.of(
                "lightning-prune profile", "result", "a readable file", given.result, str(error)
            ) from error
        result = parse_result(output, 0, "", given.result)
    label = given.label or given.ssh or Path(given.result).stem
    report = merge_device(given.bundle, result, label)
    print_table(report)
    if not result["ok"]:
        differing = [v["name"] for v in result["variants"] if not v["parity"]["ok"]]
        Console(stderr=True).print(f"The outputs of {', '.join(differing)} differ on {label}.", markup=False)


def bundle(argv: Sequence[str]) -> None:
    """Verify a bundle; sign, encrypt and archive it if asked.

    Args:
        argv: The command line after `bundle`.

    Raises:
        ConfigurationError: A key is missing or malformed.
        ExportError: The bundle was changed.
        OutputError: A file cannot be written.
    """
    parser = ArgumentParser(prog="lightning-prune bundle", description="Verify, seal and archive a bundle.")
    parser.add_argument("dirpath", type=str, help="the directory of an export")
    parser.add_argument("--public_key", type=str, help="verify the signature with this PEM file")
    parser.add_argument("--target", type=str, help="write a sealed copy there")
    parser.add_argument("--sign", type=str, help="PEM file of the Ed25519 private key to sign the copy with")
    parser.add_argument("--encrypt", action="store_true", help="encrypt the copy's models")
    parser.add_argument("--key_file", type=str, help="64 hexadecimal digits; else LIGHTNING_PRUNE_KEY")
    parser.add_argument("--archive", action="store_true", help="pack the bundle, or its copy, into a .tar.gz")
    given = parser.parse_args(list(argv))
    folder = given.dirpath
    if (given.sign or given.encrypt) and not given.target:
        raise ConfigurationError("lightning-prune bundle: --sign and --encrypt need --target DIRECTORY.")
    manifest = verify_bundle(folder, given.public_key)
    if given.target:
        folder = str(
            seal_bundle(
                folder, given.target, private_key=given.sign, encrypt=given.encrypt, key_file=given.key_file
            )
        )
    said = {"bundle": folder, "files": sorted(manifest["files"]), "verified": True}
    if given.archive:
        said["archive"] = str(archive_bundle(folder))
    Console(soft_wrap=True).print(json.dumps(said, indent=2), markup=False, highlight=False)
