"""What the subcommands of `lightning-prune` do, beyond Lightning's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from lightning_prune import _bundle_commands, _plan_table, planning
from lightning_prune import sensitivity as analysis
from lightning_prune.callbacks import _network
from lightning_prune.callbacks._block_table import candidates
from lightning_prune.callbacks._edge_output import progress_bar
from lightning_prune.callbacks._preflight import show
from lightning_prune.callbacks.edge_export import EdgeExport
from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.cost import count_parameters
from lightning_prune.deploy.calls import submodule
from lightning_prune.deploy.files import write_whole
from lightning_prune.deploy.profile import Profile
from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.exporting import export, find_data, loaded
from lightning_prune.loading import read_checkpoint
from lightning_prune.portable import save_state
from lightning_prune.report.compare import compare_files, print_comparison
from lightning_prune.report.profiled import profile_report
from lightning_prune.report.table import print_table
from lightning_prune.selection import assign, match_names, select_weights
from lightning_prune.structure.budget import Budget, widths
from lightning_prune.structure.groups import Group
from lightning_prune.structure.plan import Dense, foresee, measure, survey


class Commands:
    """Methods that a Trainer needs for LightningCLI to offer them as subcommands."""

    callbacks: list[Any]
    datamodule: Any
    given_config: dict[str, Any]

    def export(
        self,
        model: Any,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        dirpath: str | None = None,
        state_dict: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Export, quantize, evaluate and profile a trained network.

        The config's `EdgeExport` says how; without one its defaults do.

        Args:
            model: The LightningModule.
            datamodule: Gives validation and training data.
            ckpt_path: The checkpoint to export, dense or pruned.
            dirpath: Where the files go, instead of where the config's `EdgeExport` puts them.
            state_dict: Write the network there (`small.pt`) as a state dict for plain PyTorch, and no more.
            weights_only: Has no effect: a checkpoint is always read so.
        """
        if ckpt_path is None:
            raise ConfigurationError.of("export", "ckpt_path", "a checkpoint", None, "add --ckpt_path FILE")
        how = next((c for c in self.callbacks if isinstance(c, EdgeExport)), None) or EdgeExport()
        if state_dict is not None:
            trained = loaded(model, read_checkpoint(ckpt_path), ckpt_path)
            target = save_state(submodule(trained, how.module, "export"), state_dict)
            Console().print(f"Written: {target}", highlight=False)
            return
        with progress_bar() as tell:
            report = export(
                model,
                dirpath or how.dirpath,
                ckpt_path=ckpt_path,
                datamodule=datamodule,
                submodule=how.module,
                onnx=how.onnx,
                quantize=how.quantize,
                profile=how.profile,
                baseline=how.baseline,
                max_drop=how.max_drop,
                progress=tell,
            )
        print_table(report)

    def sensitivity(
        self,
        model: Any,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        dirpath: str = "sensitivity",
        metric: str | None = None,
        kinds: list[str] | None = None,
        levels: list[float] | None = None,
        batches: int = 8,
        max_drop: float = 0.01,
        weights_only: bool | None = None,
    ) -> None:
        """Find out which layers bear zeros, fewer channels, and 8 bits, one at a time, without training.

        Leaves `sensitivity.json`, `sensitivity.svg`, and `sensitivity.yaml` with levels for a config.

        Args:
            model: The LightningModule.
            datamodule: Gives validation data.
            ckpt_path: A trained checkpoint, dense or pruned; without one, the network as it is built.
            dirpath: Where the files go.
            metric: What the validation loop logs; by default a loss.
            kinds: Of `sparsity`, `width` and `int8`; by default all.
            levels: Fractions of zeros, and of channels that go; by default 0.25, 0.5, 0.75 and 0.9.
            batches: Validation batches of each run.
            max_drop: How much worse the metric may get by one layer alone, for the levels.
            weights_only: Has no effect: a checkpoint is always read so.
        """
        if ckpt_path is not None:
            model = loaded(model, read_checkpoint(ckpt_path), ckpt_path)
        asked = {"kinds": kinds, "levels": levels}
        with progress_bar() as tell:
            found = analysis.sensitivity(
                model,
                datamodule=datamodule,
                metric=metric,
                batches=batches,
                progress=lambda stage, fraction: tell("sensitivity", fraction),
                **{name: value for name, value in asked.items() if value is not None},  # type: ignore[arg-type]
            )
        paths = analysis.write(found, dirpath, max_drop)
        console = Console()
        console.print(paths[-1].read_text(), highlight=False, soft_wrap=True)
        console.print(f"{found.metric} {found.value:.4g} before; see {', '.join(map(str, paths))}")

    def plan(
        self,
        model: Any,
        datamodule: Any = None,
        budget: Budget | None = None,
        latency_ms: float | None = None,
        seconds: float = 18.0,
        output: str = "plan.yaml",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Measure what structural pruning, low rank and 8 bits would come to, and write a config.

        Nothing is trained.

        Args:
            model: The LightningModule.
            datamodule: Gives real inputs.
            budget: What may remain, in `macs`, `params`, `latency` or `latency_ms`; by default half of the
                MACs, or what `latency_ms` says.
            latency_ms: What a run of one sample may take; then that decides what is reachable.
            seconds: About how long to measure.
            output: Where the config goes.
            ckpt_path: A checkpoint to start from.
            weights_only: Has no effect: a checkpoint is always read so.
        """
        if ckpt_path is not None:
            model = loaded(model, read_checkpoint(ckpt_path), ckpt_path)
        data = find_data(model, datamodule, None)
        how = next((c for c in self.callbacks if isinstance(c, EdgeExport)), None)
        with progress_bar() as tell:
            found = planning.make_plan(
                model,
                data,
                budget or (Budget(macs=0.5) if latency_ms is None else Budget(latency_ms=latency_ms)),
                latency_ms=latency_ms,
                callbacks=self.callbacks,
                submodule=None if how is None else how.module,
                profile=Profile(max_seconds=seconds, operators=False, roofline=False),
                progress=tell,
            )
        _plan_table.show(found)
        config = planning.starting_config(self.given_config, found)
        if config is not None:
            write_whole(output, config.encode())
            Console().print(f"Start from {output}: lightning-prune fit --config {output}", soft_wrap=True)

    def inspect(
        self,
        model: Any,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show what structural, layer and magnitude pruning could do, without training.

        Args:
            model: The LightningModule.
            datamodule: Gives a batch to trace the network with, if it has no `example_input_array`.
            ckpt_path: Has no effect: structure is shown before training.
            weights_only: Has no effect.
        """
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
            self.datamodule = datamodule
        console = Console()
        found = [c for c in self.callbacks if isinstance(c, StructuralPruning)]
        for callback in found or [StructuralPruning()]:
            _inspect_structure(self, model, callback, console)
        layers = [c for c in self.callbacks if isinstance(c, LayerPruning)]
        for layer_pruning in layers or [LayerPruning()]:
            _inspect_blocks(self, model, layer_pruning, console, asked=bool(layers))
        chosen = [c for c in self.callbacks if isinstance(c, MagnitudePruning)]
        for pruning in chosen or [MagnitudePruning()]:
            _inspect_weights(model, pruning, console)


def _inspect_structure(trainer: Any, model: Any, callback: StructuralPruning, console: Console) -> None:
    calls, example = _network.find(trainer, model, callback.example_input, "inspect")
    network = _network.traced(model, calls)
    groups = survey(
        network, example, lambda names: match_names(names, callback.include, callback.exclude, "inspect")
    )
    dense = measure(network, groups, example)
    _show_groups(groups, dense, callback, console)
    console.print(f"{count_parameters(model):,} parameters, {dense.costs['macs']:,.0f} MACs for one sample")
    try:
        show(foresee(network, groups, callback.recipe, dense, example), groups, console)
    except BudgetError as error:
        console.print(str(error), style="bold")


def _show_groups(
    groups: Sequence[Group], dense: Dense, callback: StructuralPruning, console: Console
) -> None:
    table = Table(title="Channel groups", title_justify="left")
    for name in ("channels of", "channels", "can become", "layers cut together"):
        table.add_column(name, justify="right" if name == "channels" else "left", overflow="fold")
    for group in groups:
        allowed = widths(group, dense.widths[group.name], callback.round_to, callback.max_ratio)
        can = group.reason or ", ".join(map(str, allowed[:6])) + (", ..." if len(allowed) > 6 else "")
        members = ", ".join(dict.fromkeys(member.module for member in group.members))
        table.add_row(group.name, str(group.channels), can or "nothing smaller", members)
    console.print(table)


def _inspect_blocks(trainer: Any, model: Any, callback: LayerPruning, console: Console, asked: bool) -> None:
    try:
        blocks, sizes = callback.look(trainer, model)
        console.print(candidates(blocks, sizes))
        if asked:
            outlook = callback.foresee(model, blocks, sizes)
            show(outlook, blocks, console, title="Layer pruning", parts="blocks")
    except (BudgetError, ConfigurationError) as error:
        if asked:
            console.print(str(error), style="bold")


def _inspect_weights(model: Any, callback: MagnitudePruning, console: Console) -> None:
    weights = select_weights(model, callback.include, callback.exclude, "inspect")
    levels = callback.sparsity if isinstance(callback.sparsity, dict) else {"*": callback.sparsity}
    sparsity = assign(weights, levels, "inspect")
    table = Table(title="Weights that MagnitudePruning selects", title_justify="left")
    own = isinstance(callback.sparsity, dict) or callback.scope == "layer"
    for name in ("weight", "shape", "parameters", *(["zeros at the end"] if own else [])):
        table.add_column(name, justify="left" if name == "weight" else "right")
    for name, level in sparsity.items():
        parameter = weights[name].parameter
        shape = " x ".join(map(str, parameter.shape))
        table.add_row(name, shape, f"{parameter.numel():,}", *([f"{level:.0%}"] if own else []))
    console.print(table)


def profile(argv: Sequence[str]) -> None:
    """Measure ONNX files side by side, and print a table.

    Args:
        argv: The command line after `profile`.

    Raises:
        ConfigurationError: A file does not exist, or an option is out of range.
        ProfileError: No file could be timed.
    """
    if any(word.split("=")[0] == "--bundle" for word in argv):
        _bundle_commands.profile_device(argv)
        return
    parser = ArgumentParser(prog="lightning-prune profile", description="Measure ONNX files side by side.")
    parser.add_argument("files", nargs="+", type=str, help="dense.onnx, else the first, is the baseline")
    parser.add_argument("--json", type=str, help="also write the report there")
    parser.add_class_arguments(Profile)
    options = parser.parse_args(list(argv)).as_dict()
    files, target = options.pop("files"), options.pop("json")
    with progress_bar() as tell:
        report = profile_report(files, Profile(**options), progress=tell)
    print_table(report)
    if target is not None:
        write_whole(target, report.to_json().encode())


def compare(argv: Sequence[str]) -> None:
    """Print the reports of several runs side by side.

    Args:
        argv: The command line after `compare`.

    Raises:
        ConfigurationError: There are fewer than two reports, or one cannot be read.
    """
    parser = ArgumentParser(prog="lightning-prune compare", description="Compare the reports of runs.")
    parser.add_argument("paths", nargs="+", type=str, help="report.json files, or directories with one")
    parser.add_argument("--variant", type=str, help="compare only this one")
    options = parser.parse_args(list(argv))
    print_comparison(compare_files(options.paths, options.variant))


MEASURING = {"profile": profile, "compare": compare, "bundle": _bundle_commands.bundle}
"""Subcommands that need no config, model or Trainer."""
