"""The `lightning-prune` command: Lightning's own subcommands, and what comes before and after a fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lightning_prune import _commands
from lightning_prune._lightning import NAMESPACES
from lightning_prune.errors import LightningPruneError
from lightning_prune.loading import read_checkpoint


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; what `lightning-prune` calls.

    `fit`, `validate`, `test` and `predict` are LightningCLI's. `export` does after training what `EdgeExport`
    does at its end; `inspect` shows what pruning could do, and trains nothing. Both take the config of the
    fit. `profile` measures ONNX files, or a bundle on a device; `bundle` verifies, signs, encrypts and packs
    what an export left; `compare` sets the reports of several runs side by side. Modules in the working
    directory and beside a `--config` file can be named in it.

    Args:
        args: The command line without the program's name; by default the process's.

    Raises:
        SystemExit: The command failed; an error of this package is printed as one sentence.
    """
    argv = list(sys.argv[1:] if args is None else args)
    configs = _configs(argv)
    for folder in (Path.cwd(), *(path.resolve().parent for path in configs)):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        if argv and argv[0] in _commands.MEASURING:
            _commands.MEASURING[argv[0]](argv[1:])
        else:
            _run_or_explain(args, argv, configs)
    except LightningPruneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        raise SystemExit(1) from None


def _run_or_explain(args: Sequence[str] | None, argv: Sequence[str], configs: Sequence[Path]) -> None:
    try:
        run(args, namespace(argv, configs))
    except LightningPruneError:
        raise
    except Exception:
        # LightningCLI reads the checkpoint's hyperparameters before anyone can say that it is none.
        for path in _values(argv, "--ckpt_path"):
            if path not in ("best", "last", "hpc", "registry"):
                read_checkpoint(path)
        raise


def run(args: Sequence[str] | None, lightning: str) -> Any:
    """Run a LightningCLI with this package's subcommands added.

    Args:
        args: The command line without the program's name; by default the process's.
        lightning: The namespace to use: `"pytorch_lightning"` or `"lightning.pytorch"`.

    Returns:
        The LightningCLI, when its subcommand is done.
    """
    base = import_module(lightning)
    cli = import_module(f"{lightning}.cli")

    class Trainer(_commands.Commands, base.Trainer):  # type: ignore[misc, name-defined]
        """Lightning's Trainer, with the methods behind this package's subcommands."""

        given_config = _contents(_configs(list(sys.argv[1:] if args is None else args)))

    class PruneCLI(cli.LightningCLI):  # type: ignore[misc, name-defined]
        """Lightning's command line, with the subcommands of this package."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """Lightning's subcommands and ours, with the arguments that a config cannot give."""
            ours = {name: {"model", "datamodule"} for name in ("export", "inspect", "plan", "sensitivity")}
            return {**cli.LightningCLI.subcommands(), **ours}

    Trainer.__module__ = __name__
    return PruneCLI(
        args=None if args is None else list(args),
        trainer_class=Trainer,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-prune", "epilog": "Also: lightning-prune profile, and compare."},
    )


def namespace(argv: Sequence[str], configs: Sequence[Path]) -> str:
    """Find out which Lightning the user's model belongs to.

    Args:
        argv: The command line.
        configs: The config files it names.

    Returns:
        The namespace of the model's class; `"pytorch_lightning"` where the model cannot be told.

    Example:
        >>> namespace(["fit", "--model", "pytorch_lightning.demos.boring_classes.BoringModel"], [])
        'pytorch_lightning'
    """
    words = [word for word in argv if word.startswith(("--model=", "--model.class_path="))]
    paths = [word.split("=", 1)[1] for word in words]
    paths += [argv[i + 1] for i, word in enumerate(argv[:-1]) if word in ("--model", "--model.class_path")]
    for config in configs:
        with config.open() as file:
            content = yaml.safe_load(file)
        model = content.get("model") if isinstance(content, dict) else None
        path = model.get("class_path") if isinstance(model, dict) else model
        paths += [path] if isinstance(path, str) else []
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            bases = getattr(import_module(module), name).__mro__
        except (ImportError, AttributeError, ValueError):
            continue  # LightningCLI says what is wrong with it
        for lightning in NAMESPACES:
            if any(base.__module__.startswith(f"{lightning}.") for base in bases):
                return lightning
    return NAMESPACES[0]


def _contents(configs: Sequence[Path]) -> dict[str, Any]:
    """Read config files into one; of what several say, the last counts."""
    found: dict[str, Any] = {}
    for config in configs:
        content = yaml.safe_load(config.read_text())
        if isinstance(content, dict):
            trainer = {**(found.get("trainer") or {}), **(content.get("trainer") or {})}
            found = {**found, **content, "trainer": trainer}
    return found


def _configs(argv: Sequence[str]) -> list[Path]:
    given = [*_values(argv, "--config"), *_values(argv, "-c")]
    return [Path(name) for name in given if Path(name).is_file()]


def _values(argv: Sequence[str], option: str) -> list[str]:
    given = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == option]
    return given + [word.split("=", 1)[1] for word in argv if word.startswith(f"{option}=")]
