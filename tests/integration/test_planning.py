"""`lightning-prune plan`: it measures what there is, marks what is reached, and its config runs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import yaml
from command_cases import CONFIG, command
from latency_cases import known_times, milliseconds, network
from magnitude_cases import LIGHTNING_WARNINGS, data
from rich.console import Console
from structural_cases import Net, assert_equal_state, macs

from lightning_prune import planning
from lightning_prune._pipeline import run
from lightning_prune._plan_table import show
from lightning_prune._task import Data
from lightning_prune.callbacks.low_rank import LowRank
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.deploy import latency_table
from lightning_prune.deploy.profile import Profile
from lightning_prune.errors import ConfigurationError
from lightning_prune.planning import RECIPES, Outcome, Plan, make_plan, starting_config
from lightning_prune.report.results import Latency, Report, Variant
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS
FAST = Profile(rounds=20, max_seconds=3.0, operators=False, roofline=False)
OWN = [StructuralPruning(round_to=1), LowRank(round_to=1)]


@pytest.fixture(scope="module")
def found():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    plan = make_plan(net, Data(data(), data()), Budget(macs=0.5), callbacks=OWN, profile=FAST)
    assert_equal_state(dict(net.state_dict()), dict(before))
    return plan


def test_every_recipe_is_measured_in_float_and_in_8_bits(found):
    names = [outcome.variant.name for outcome in found.outcomes]
    assert names == [*RECIPES, *(f"{recipe}.int8" for recipe in RECIPES)]
    dense = macs(Net())
    for outcome in found.outcomes:
        assert outcome.variant.macs == pytest.approx(outcome.fraction * dense)
        assert outcome.variant.latency_ms.p50 > 0
        assert outcome.variant.bytes > 0
        assert outcome.reaches == (outcome.recipe != "dense") == (outcome.fraction <= 0.5)
        assert not outcome.variant.metrics
    assert found.best.variant.name == "structural"


def test_the_table_says_what_is_reached(found, capsys):
    console = Console(width=140)
    with console.capture() as capture:
        show(found, console)
    lines = capture.get().splitlines()
    assert sum("yes" in line for line in lines) == 6
    assert any("structural " in line and "in plan" in line for line in lines)


def test_what_cannot_be_reached_says_why_and_the_others_go_on():
    plan = make_plan(
        Net(), Data(data(), data()), Budget(macs=0.05), callbacks=[OWN[0], LowRank(round_to=16)], profile=FAST
    )
    reasons = {outcome.recipe: outcome.reason for outcome in plan.outcomes if outcome.variant is None}
    assert "smallest" in reasons["low-rank"]
    assert all(outcome.reaches == (outcome.fraction <= 0.05) for outcome in plan.outcomes if outcome.variant)


def outcome(name, p50, fraction=1.0, limit=2.0):
    variant = Variant(name, macs=10, latency_ms=Latency(p50=p50, p90=p50, p99=None, mean=p50, runs=10))
    return Outcome(name.removesuffix(".int8"), variant, fraction, p50 <= limit)


def plan(*outcomes):
    report = Report(tuple(o.variant for o in outcomes), title="Net")
    return Plan(Budget(macs=0.5), 2.0, tuple(outcomes), report)


def test_with_a_latency_the_recipe_that_changes_least_is_taken():
    slow = [outcome("dense", 4.0), outcome("structural", 2.5, 0.5), outcome("structural.int8", 1.0, 0.5)]
    assert plan(*slow).best.variant.name == "structural.int8"
    assert plan(*slow, outcome("dense.int8", 1.9)).best.variant.name == "dense.int8"
    assert plan(outcome("dense", 4.0)).best is None


def test_with_a_budget_of_latency_channels_go_by_measured_times(monkeypatch):
    monkeypatch.setattr(latency_table, "time_files", known_times)
    dense = milliseconds(network())
    reports, profile = [], Profile(rounds=20, max_seconds=2.0, operators=False, roofline=False)

    def kept(task, progress):
        reports.append({name: milliseconds(net) for name, net in task.modules.items()})
        return run(task, progress)

    monkeypatch.setattr(planning, "run", kept)
    given = Data(data(), data())
    plan = make_plan(network(), given, Budget(latency_ms=0.5 * dense), callbacks=[OWN[1]], profile=profile)
    assert reports[0]["dense"] == pytest.approx(dense)
    assert reports[0]["structural"] <= 0.5 * dense
    assert reports[0]["low-rank-structural"] <= 0.5 * dense
    assert plan.latency_ms == pytest.approx(0.5 * dense)
    assert plan.budget.latency == pytest.approx(0.5, rel=0.01)
    for outcome in plan.outcomes:
        assert outcome.reaches == (outcome.variant.latency_ms.p50 <= plan.latency_ms)
    content = yaml.safe_load(starting_config(GIVEN, replace(plan, outcomes=plan.outcomes[3:4])))
    *_, low, structural, _ = content["trainer"]["callbacks"]
    assert set(low["init_args"]["budget"]) == {"macs"}
    assert structural["init_args"]["budget"] == {"latency_ms": pytest.approx(0.5 * dense)}
    console = Console(width=140)
    with console.capture() as capture:
        show(plan, console)
    assert "latency left" in capture.get()


GIVEN = {
    "model": "planned.Net",
    "data": "planned.Data",
    "trainer": {
        "max_epochs": 10,
        "callbacks": [
            "lightning_prune.AfterPruning",
            {"class_path": "lightning_prune.StructuralPruning",
             "init_args": {"budget": {"macs": 0.9}, "round_to": 1, "exclude": ["stem"]}},
            {"class_path": "lightning_prune.LowRank", "init_args": {"ratio": 0.3, "round_to": 1}},
            {"class_path": "lightning_prune.EdgeExport", "init_args": {"dirpath": "mine"}},
        ],
    },
}  # fmt: skip


def test_the_config_keeps_what_is_the_users_and_asks_for_the_budget():
    both = plan(outcome("low-rank-structural", 1.0, 0.5))
    content = yaml.safe_load(starting_config(GIVEN, both))
    assert content["model"] == "planned.Net"
    first, low, structural, export = content["trainer"]["callbacks"]
    assert first == "lightning_prune.AfterPruning"
    assert low["init_args"]["budget"] == {"macs": 0.7071}
    assert low["init_args"]["round_to"] == 1
    assert "ratio" not in low["init_args"]
    assert structural["init_args"]["budget"] == {"macs": 0.5}
    assert structural["init_args"]["exclude"] == ["stem"]
    assert export["init_args"] == {"dirpath": "mine"}
    assert starting_config(GIVEN, plan(outcome("dense", 4.0))) is None


@pytest.mark.parametrize(
    ("budget", "latency_ms", "match"),
    [
        (Budget(channels=0.5), None, "channels"),
        (Budget(macs=0.5), 0.0, "latency_ms"),
        (Budget(macs=0.5), -1.0, "ms"),
    ],
    ids=["kind", "zero", "negative"],
)
def test_wrong_input_is_refused(budget, latency_ms, match):
    with pytest.raises(ConfigurationError, match=match):
        make_plan(Net(), Data(data()), budget, latency_ms=latency_ms)


CALLBACKS = """
  callbacks:
    - {class_path: lightning_prune.StructuralPruning, init_args: {round_to: 1}}
    - class_path: lightning_prune.EdgeExport
      init_args: {quantize: null, profile: null}
"""


@pytest.mark.slow
def test_the_config_of_the_command_runs_and_meets_the_budget(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG + CALLBACKS.lstrip("\n"))
    out = command(tmp_path, "plan --config config.yaml --budget.macs 0.6 --seconds 3")
    assert "lightning-prune fit --config plan.yaml" in out
    command(tmp_path, "fit --config plan.yaml")
    report = Report.load(tmp_path / "edge")
    assert report.variants[-1].macs <= 0.6 * macs(Net())
