"""What the benchmarks rest on: splits, batches that a resumed run finds again, boxes, names of runs."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> Iterator[SimpleNamespace]:
    """The scripts' modules, which import each other by plain names that are no one else's business."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(
        **{
            name: importlib.import_module(name)
            for name in ("data", "detection", "accuracy", "accuracy_table", "learning", "networks", "tasks")
        }
    )
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def random_boxes(count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    low, size = torch.rand(2, count, 2, generator=random) * 40
    return torch.cat([low, low + size + 1], 1)


def test_nobody_is_in_two_parts_of_a_split(parts: SimpleNamespace) -> None:
    people = np.repeat(np.arange(37), 5)
    masks = parts.data.by_person(people, {"train": 0.6, "val": 0.15, "test": 0.25})
    assert sum(masks.values()).tolist() == [1] * len(people)
    found = [set(people[mask]) for mask in masks.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 37


def test_a_batch_depends_on_its_epoch_and_number_alone(parts: SimpleNamespace) -> None:
    def batches() -> object:
        x, y = torch.arange(40.0).view(20, 1, 2), torch.arange(20)
        return parts.data.Batches(x, y, 4, seed=1, augment=parts.data.signals(1, 0.5))

    first, resumed = batches(), batches()
    seen = [first[epoch, i] for epoch in range(2) for i in range(5)]  # type: ignore[index]
    x, y = resumed[1, 3]  # type: ignore[index]
    torch.testing.assert_close(x, seen[8][0], rtol=0, atol=0)
    assert y.tolist() == seen[8][1].tolist()
    labels = [torch.cat([y for _, y in seen[k : k + 5]]).tolist() for k in (0, 5)]
    assert [sorted(one) for one in labels] == [list(range(20))] * 2
    assert labels[0] != labels[1]


@pytest.mark.parametrize(
    ("edges", "how"), [("black", {}), ("gray", {}), ("replicate", {"mode": "edge"})], ids=str
)
def test_pictures_are_moved_and_mirrored_with_the_edges_that_are_asked_for(
    parts: SimpleNamespace, edges: str, how: dict[str, str]
) -> None:
    x = torch.randint(0, 256, (60, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    moved, _ = parts.data.pictures(2, edges)(x, torch.zeros(60), torch.Generator().manual_seed(2))
    assert moved.dtype == torch.uint8
    seen = set()
    for before, after in zip(x.numpy(), moved.numpy(), strict=True):
        colors = [124, 116, 104] if edges == "gray" else [0, 0, 0]
        wide = np.stack(
            [np.pad(c, 2, **(how or {"constant_values": k})) for c, k in zip(before, colors, strict=True)]
        )
        cuts = {
            (a, b, turned): wide[:, a : a + 6, b : b + 5][:, :, :: -1 if turned else 1]
            for a in range(5)
            for b in range(5)
            for turned in (False, True)
        }
        seen.add(next(key for key, cut in cuts.items() if np.array_equal(cut, after)))
    assert len(seen) > 25
    assert {key[:1] for key in seen} == {(a,) for a in range(5)}


def test_a_box_of_the_next_picture_is_pasted_into_the_part_that_is_asked_for(parts: SimpleNamespace) -> None:
    n = 2000
    x = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, 8, 8)
    augment = parts.data.pictures(0, "replicate", paste=0.5)
    pasted, labels = augment(x, torch.arange(n), torch.Generator().manual_seed(3))
    assert labels.tolist() == list(range(n))
    foreign = pasted != x
    assert torch.equal(pasted[foreign], x.roll(1, 0)[foreign])
    share = foreign[:, 0].double().mean((1, 2))
    # Half of half: every share of the picture is as likely, less what lies outside of it.
    assert (share > 0).double().mean() == pytest.approx(0.5, abs=0.04)
    assert 0.25 < share[share > 0].mean() < 0.5
    for mask in foreign[:50, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns), "it is a box"


def test_pasting_without_a_teacher_is_refused(parts: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="needs teach=1"):
        parts.learning.Recipe(teach=0.9, paste=0.5)


def test_mirrored_boxes_stay_on_what_they_mark(parts: SimpleNamespace) -> None:
    x, y = torch.zeros(64, 1, 9, 12), torch.full((64, 2, 5), -1.0)
    x[:, :, 2:5, 3:10], y[:, 0] = 1.0, torch.tensor([3.0, 2.0, 10.0, 5.0, 0.0])
    moved, boxes = parts.data.mirrored_boxes(x, y, torch.Generator().manual_seed(0))
    places = set()
    for picture, box in zip(moved, boxes[:, 0], strict=True):
        x1, y1, x2, y2 = box[:4].int().tolist()
        assert picture[0, y1:y2, x1:x2].sum() == picture.sum() == 21
        places.add((x1, y1))
    assert len(places) == 4


def test_boxes_survive_being_told_relative_to_anchors(parts: SimpleNamespace) -> None:
    boxes, at = random_boxes(50), random_boxes(50).flip(0)
    told = parts.detection.decode(parts.detection.encode(boxes, at), at)
    torch.testing.assert_close(told, boxes, rtol=1e-4, atol=1e-3)


def test_suppression_keeps_what_no_better_box_covers(parts: SimpleNamespace) -> None:
    boxes, scores = random_boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(1))
    kept = parts.detection.suppress(boxes, scores).tolist()

    def covers(a: int, b: int) -> bool:
        width, height = (
            max(0.0, float(min(boxes[a, k + 2], boxes[b, k + 2]) - max(boxes[a, k], boxes[b, k])))
            for k in (0, 1)
        )
        areas = [float((boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])) for i in (a, b)]
        return width * height / (sum(areas) - width * height) > 0.5

    expected: list[int] = []
    for i in sorted(range(60), key=lambda i: -float(scores[i])):
        if not any(covers(j, i) for j in expected):
            expected.append(i)
    assert kept == expected
    assert len(kept) < 60


def test_the_detector_has_an_output_for_every_anchor(parts: SimpleNamespace) -> None:
    with torch.no_grad():
        found = parts.detection.Retina(8)(torch.zeros(1, 3, 48, 80))
    count = len(parts.detection.anchors(48, 80))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "scores": (1, count, 3),
        "boxes": (1, count, 4),
    }


def test_names_of_runs_read_as_their_options(parts: SimpleNamespace) -> None:
    name = "structural_macs0.5_round_to-4_importance-bn_scale_lr-0.1_40epochs"
    expected = "structural, macs0.5, round_to=4, importance=bn_scale, lr=0.1, 40epochs"
    assert parts.accuracy_table.title_of(name) == expected


def test_a_file_that_lost_its_zeros_is_refused_and_one_with_biases_is_not(parts: SimpleNamespace) -> None:
    network = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))  # 96 weights, 10 biases
    file = {"parameters": 106, "nonzero": 106 - 77}
    parts.accuracy.check_zeros("magnitude", 0.8, network, file)
    with pytest.raises(RuntimeError, match=r"magnitude made 66\.0% zeros, not 80\.0%"):
        parts.accuracy.check_zeros("magnitude", 0.8, network, {**file, "nonzero": 106 - 70})


def test_the_small_peer_is_of_the_width_that_comes_closest_to_the_budget(parts: SimpleNamespace) -> None:
    from lightning_prune.cost import count_macs

    # Ten of 16 channels are 39.1 % of the MACs, nine are 31.7 %.
    task = parts.tasks.TASKS["resnet56"]
    network, x = parts.accuracy.small(task, 0.389), (torch.zeros(1, *task.shape),)
    dense = count_macs(task.network(task.width), x)
    assert count_macs(network, x) == count_macs(task.network(10), x)
    assert count_macs(network, x) / dense == pytest.approx(0.391, abs=1e-3)


def test_every_small_peer_can_be_built_and_is_about_as_small_as_asked(parts: SimpleNamespace) -> None:
    from lightning_prune.cost import count_macs

    for name in ("resnet8", "motion_cnn", "cells"):
        task = parts.tasks.TASKS[name]
        x = (torch.zeros(1, *task.shape),)
        share = count_macs(parts.accuracy.small(task, 0.5), x) / count_macs(task.network(task.width), x)
        assert share == pytest.approx(0.5, abs=0.1), name


def test_the_peer_is_trained_in_train_mode(parts: SimpleNamespace) -> None:
    task = parts.tasks.TASKS["resnet8"]
    network = parts.accuracy.torch_pruning(task.network(task.width), task, 0.9)
    assert all(layer.training for layer in network.modules())


def test_the_peer_leaves_the_outputs_of_a_detection_network(parts: SimpleNamespace) -> None:
    task = parts.tasks.TASKS["cells"]
    x = torch.zeros(1, *task.shape)
    dense = task.network(8)
    network = parts.accuracy.torch_pruning(copy.deepcopy(dense), task, 0.9)
    assert network.smooth[0].out_channels < dense.smooth[0].out_channels
    for name, y in network(x).items():
        assert y.shape == dense(x)[name].shape


class Killed(Exception):
    """Stands for a kill."""


class Kill(Callback):
    """Ends a run in the middle of its third epoch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise Killed


@pytest.fixture
def toy(parts: SimpleNamespace) -> Any:
    def network(width: int) -> nn.Module:
        layers = (nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))
        return nn.Sequential(*layers)

    random = torch.Generator().manual_seed(0)
    split = (torch.randn(64, 6, generator=random), torch.randint(0, 3, (64,), generator=random))
    recipe = parts.learning.Recipe(lr=0.1, teach=0.5)
    read = lambda root: {"train": split, "val": split, "all": split, "test": split}  # noqa: E731
    return parts.tasks.Task("toy", network, 16, (6,), 3, read, recipe=recipe, batch=16)


def trained(
    parts: SimpleNamespace, toy: Any, folder: Path, *extra: Callback, method: str = "structural"
) -> dict[str, torch.Tensor]:
    """Train a toy network with a teacher, pruning it, as the benchmark does."""
    arguments = SimpleNamespace(
        accelerator="cpu", precision="32-true", progress=False, choose=False, task="toy", macs=0.5,
        epochs=4, set=[], zeros=0.8,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = toy.network(16)
    teacher = parts.learning.Teacher(dense, folder / "answers")
    module = toy.learner(copy.deepcopy(dense), 3, toy.recipe, teacher)
    callbacks = parts.accuracy.callbacks_of(method, module.network, arguments) + list(extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts.accuracy.fit(module, toy, toy.read(None), folder, 4, 1, arguments, callbacks)
    return dict(module.network.state_dict())


def test_a_peer_that_cannot_cut_a_network_is_in_the_table(
    parts: SimpleNamespace, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recurrent(nn.GRU):
        def forward(self, x: torch.Tensor, hx: torch.Tensor | None = None) -> Any:
            return super().forward(x, hx)[0]

    recurrent = replace(toy, network=lambda width: nn.Sequential(Recurrent(6, width), nn.Linear(width, 3)))
    monkeypatch.setitem(parts.tasks.TASKS, "toy", recurrent)
    monkeypatch.setattr(parts.accuracy, "RESULTS", tmp_path / "results")
    command = ["accuracy.py", "toy", "--methods", "torch-pruning", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", command)
    with warnings.catch_warnings():
        parts.accuracy.main()
    assert not list(tmp_path.rglob("result.json"))
    (line,) = re.findall("Failed: .*", (tmp_path / "results" / "accuracy_toy.md").read_text(encoding="utf-8"))
    assert re.fullmatch(r"Failed: torch-pruning, macs0\.5, allepochs: .+\.", line)


def test_added_runs_stand_beside_those_that_the_table_has(
    parts: SimpleNamespace, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parts.tasks.TASKS, "toy", toy)
    monkeypatch.setattr(parts.accuracy, "RESULTS", tmp_path / "results")

    def run(work: str, *rest: str) -> dict[str, Any]:
        monkeypatch.setattr(
            sys, "argv", ["accuracy.py", "toy", "--epochs", "2", "--work", str(tmp_path / work), *rest]
        )
        with warnings.catch_warnings():
            parts.accuracy.main()
        return json.loads((tmp_path / "results" / "accuracy_toy.json").read_text(encoding="utf-8"))

    before = run("one", "--methods", "dense", "tuned", "--seeds", "0", "2", "--precision", "bf16-mixed")
    both = run("two", "--methods", "tuned", "--seeds", "1", "2", "--add")["results"]
    assert both["dense"] == before["results"]["dense"]
    assert [one["seed"] for one in both["tuned, 2epochs"]] == [0, 1, 2]
    assert [one["precision"] for one in both["tuned, 2epochs"]] == ["bf16-mixed", "32-true", "32-true"]
    text = (tmp_path / "results" / "accuracy_toy.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| tuned, 2epochs | 3 | 2 |")]
    assert row.endswith("| 32-true and bf16-mixed |")
    alone = run("two", "--methods", "tuned", "--seeds", "1", "2")["results"]
    assert [[one["seed"] for one in runs] for runs in alone.values()] == [[1, 2]]


def test_channels_last_in_memory_change_no_number_but_by_rounding(
    parts: SimpleNamespace, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(width: int) -> nn.Module:
        layers = (nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(width, 3))

    random = torch.Generator().manual_seed(0)
    split = (torch.randn(64, 3, 8, 8, generator=random), torch.randint(0, 3, (64,), generator=random))
    read = lambda root: {"train": split, "val": split, "all": split, "test": split}  # noqa: E731
    monkeypatch.setitem(parts.tasks.TASKS, "toy", replace(toy, network=network, shape=(3, 8, 8), read=read))
    monkeypatch.setattr(parts.accuracy, "RESULTS", tmp_path / "results")
    found = []
    for extra in ([], ["--channels-last"]):
        work = tmp_path / f"work{len(extra)}"
        command = ["accuracy.py", "toy", "--epochs", "2", "--methods", "tuned", "--work", str(work)]
        monkeypatch.setattr(sys, "argv", command + extra)
        with warnings.catch_warnings():
            parts.accuracy.main()
        (checkpoint,) = work.rglob("last.ckpt")
        found.append(torch.load(checkpoint, weights_only=True)["state_dict"]["network.0.weight"])
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    assert not found[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found[0], found[1])


def test_a_killed_run_goes_on_to_the_same_weights(
    parts: SimpleNamespace, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parts.accuracy.TASKS, "toy", toy)
    whole = trained(parts, toy, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(parts, toy, tmp_path / "killed", Kill())
    assert torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["epoch"] == 1
    torch.manual_seed(9)
    resumed = trained(parts, toy, tmp_path / "killed")
    assert whole["0.weight"].shape[0] < 16
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_killed_run_of_the_peer_that_cannot_resume_begins_again(
    parts: SimpleNamespace, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parts.accuracy.TASKS, "toy", toy)
    whole = trained(parts, toy, tmp_path / "whole", method="ModelPruning")
    with pytest.raises(Killed):
        trained(parts, toy, tmp_path / "killed", Kill(), method="ModelPruning")
    again = trained(parts, toy, tmp_path / "killed", method="ModelPruning")
    weights = torch.cat([whole[name].flatten() for name in ("0.weight", "4.weight")])
    assert (weights == 0).double().mean() == pytest.approx(0.8, abs=0.01)
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_answers_that_were_kept_are_the_teachers(parts: SimpleNamespace, tmp_path: Path) -> None:
    network, batches = nn.Linear(3, 2), torch.randn(4, 5, 3)
    teacher = parts.learning.Teacher(network, tmp_path)
    given = [teacher.answers(x, 0, i) for i, x in enumerate(batches)]
    for x, answer in zip(batches, given, strict=True):
        torch.testing.assert_close(answer, network(x).detach(), rtol=0, atol=0)
    teacher.keep(0, 5)
    assert not list(tmp_path.iterdir()), "an epoch that was not seen whole is not kept"
    teacher.keep(0, 4)
    nn.init.zeros_(network.weight)
    forgetful = parts.learning.Teacher(network, tmp_path)
    for i, x in enumerate(batches):
        assert torch.equal(forgetful.answers(x, 0, i), given[i])
    assert not torch.equal(forgetful.answers(batches[0], 1, 0), given[0])
