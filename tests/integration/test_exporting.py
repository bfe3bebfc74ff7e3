"""export(): what EdgeExport does, for a module or a checkpoint at any time."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from export_cases import Inner, Net, hashes, loader, trainer
from processes import run_python
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    EdgeExport,
    LayerPruning,
    LowRank,
    MagnitudePruning,
    QuantizationAwareTraining,
    Quantize,
    Schedule,
    _pipeline,
    export,
    load_pruned,
)
from lightning_prune.deploy.onnx import Onnx
from lightning_prune.errors import (
    CheckpointError,
    OutputError,
    ProfileError,
    QuantizationError,
    SelectionError,
    TracingError,
)
from lightning_prune.report.results import Report

pytestmark = [
    # Lightning 2.6 still uses a name that torch's pytree is giving up.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"),
    # Tiny data on two cores: loaders without workers.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Data(pl.LightningDataModule):
    prepared = 0

    def prepare_data(self):
        self.prepared += 1

    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader(1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A fit without this package, over a datamodule that shuffles."""
    path = tmp_path_factory.mktemp("plain")
    pl.seed_everything(0)
    net, keep = Net(), ModelCheckpoint(path, filename="plain")
    trainer(path, [keep], max_epochs=1, enable_checkpointing=True).fit(net, datamodule=Data())
    return net, path / "plain.ckpt"


@pytest.fixture(scope="module")
def exported(plain, tmp_path_factory):
    """The export of the module itself."""
    path = tmp_path_factory.mktemp("exported") / "edge"
    before = copy.deepcopy(plain[0].state_dict())
    report = export(plain[0], path, datamodule=Data(), profile=None)
    assert all(torch.equal(v, before[k]) for k, v in plain[0].state_dict().items())
    return path, report


def test_a_module_is_exported_without_a_trainer(exported):
    path, report = exported
    assert sorted(hashes(path)) == ["dense.int8.onnx", "dense.onnx"]
    assert report == Report.load(path)
    assert set(report.variant("dense.int8").metrics) == {"val_loss", "val_acc"}


def test_the_report_has_the_recall_of_each_class(exported):
    path, report = exported
    session = onnxruntime.InferenceSession(str(path / "dense.int8.onnx"))
    x, y = loader(1).dataset.tensors
    predicted = session.run(None, {"x": x.numpy()})[0].argmax(1)
    expected = confusion_matrix(y.numpy(), predicted, labels=[0, 1, 2])
    assert report.variant("dense.int8").classes["confusion"] == expected.tolist()
    assert report.variant("dense").classes["names"] == ["0", "1", "2"]


def test_a_plain_checkpoint_gives_the_same_files_as_the_module(plain, exported, tmp_path):
    torch.manual_seed(3)  # another random state, and another order of the shuffled batches
    export(Net(), tmp_path / "edge", ckpt_path=plain[1], datamodule=Data(), profile=None)
    assert hashes(tmp_path / "edge") == hashes(exported[0])


def test_a_bare_state_dict_is_a_checkpoint_too(plain, exported, tmp_path):
    torch.save(plain[0].state_dict(), tmp_path / "weights.pt")
    data = {"val": loader(1), "train": loader(shuffle=True)}
    export(Net(), tmp_path / "edge", ckpt_path=tmp_path / "weights.pt", dataloaders=data, profile=None)
    assert hashes(tmp_path / "edge") == hashes(exported[0])


KINDS = {
    "low rank": lambda: LowRank(ratio=0.25),
    "whole blocks": lambda: LayerPruning(1),
    "training in 8 bits": lambda: QuantizationAwareTraining(),
}


class Residual(Net):
    def __init__(self):
        super().__init__()
        blocks = [ResidualBlock(), ResidualBlock()]
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
        )


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_every_other_method_gives_the_files_of_the_fits_end(kind, tmp_path):
    pl.seed_everything(0)
    module, path = Residual(), tmp_path / "last.ckpt"
    how = {"profile": None, "quantize": Quantize() if "8 bits" in kind else None}
    callbacks = [KINDS[kind](), EdgeExport(str(tmp_path / "fit"), trial=False, **how)]
    fitted = trainer(tmp_path, callbacks)
    fitted.fit(module, loader(0, shuffle=True), loader(1))
    fitted.save_checkpoint(path)
    with torch.no_grad():
        x = torch.randn(4, 1, 8, 8)
        assert torch.equal(load_pruned(Residual, path).eval()(x), module.eval()(x))
    data = {"val": loader(1), "train": loader(0, shuffle=True)}
    again = export(Residual(), tmp_path / "again", ckpt_path=path, dataloaders=data, **how)
    for one, two in zip(callbacks[1].report.variants, again.variants, strict=True):
        assert (one.name, one.metrics, one.macs) == (two.name, two.metrics, two.macs)
        assert (tmp_path / "fit" / one.file).read_bytes() == (tmp_path / "again" / two.file).read_bytes()


def test_another_checkpoint_can_be_the_dense_baseline(plain, tmp_path):
    net = copy.deepcopy(plain[0])
    with torch.no_grad():
        net.model[3].weight[:, ::2] = 0
    report = export(
        net, tmp_path / "edge", baseline=plain[1], dataloaders=loader(1), quantize=None, profile=None
    )
    assert [v.name for v in report.variants] == ["dense", "pruned"]
    assert report.variant("dense").nonzero - report.variant("pruned").nonzero == 16 * 8 * 9


def test_masks_from_a_checkpoint_without_edge_export_are_called_pruned(tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="masked")
    mask = MagnitudePruning(0.5, schedule=Schedule("one_shot", begin=0.0))
    trainer(tmp_path, [mask, keep], max_epochs=1, enable_checkpointing=True).fit(Net(), loader(), loader(1))
    ckpt = tmp_path / "ckpt" / "masked.ckpt"
    report = export(Net(), tmp_path / "edge", ckpt_path=ckpt, dataloaders=loader(1), profile=None)
    assert [v.name for v in report.variants] == ["pruned", "pruned.int8"]
    assert [c["callback"] for c in report.pruning["callbacks"]] == ["MagnitudePruning"]
    assert report.pruning["callbacks"][0]["history"][-1]["target"] == 0.5


def test_a_baseline_taken_before_training_is_told_in_the_report(tmp_path):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None, quantize=None)
    mask = MagnitudePruning(0.5, schedule=Schedule("one_shot", begin=0.0))
    trainer(tmp_path, [mask, edge], max_epochs=1).fit(Net(), loader(), loader(1))
    assert any("taken before the first training step" in text for text in edge.report.warnings)


def test_a_submodule_can_be_exported(tmp_path):
    report = export(
        Inner(), tmp_path / "edge", submodule="model", dataloaders=loader(1), quantize=None, profile=None
    )
    assert "val_acc" in report.variant("dense").metrics
    assert report.title == "Inner.model"


class Pictures(pl.LightningModule):
    """Takes a list of pictures and gives a dict for each, as detection networks do."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images):
        found = []
        for image in images:
            out = self.head(self.backbone(image[None])).flatten(2)[0].T
            out = out[torch.nonzero(out[:, 4] > 0).squeeze(1)]
            found.append({"boxes": out[:, :4], "scores": out[:, 4]})
        return found

    def validation_step(self, batch, batch_idx):
        self.log("val_found", float(len(self(list(batch[0]))[0]["boxes"])))


def test_a_network_that_takes_a_list_of_pictures_is_exported_whole_or_its_backbone(tmp_path):
    torch.manual_seed(0)
    net = Pictures()
    data = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8)), batch_size=1)
    loaders = {"val": data, "train": data}
    how = Onnx(legacy=True, opset=17, dynamic_batch=False)
    quiet = {"profile": None, "dataloaders": loaders}
    report = export(net, tmp_path / "whole", onnx=how, quantize=None, **quiet)
    with torch.no_grad():
        counts = [len(net.eval()([x])[0]["boxes"]) for (x,) in data.dataset]
    assert report.variants[0].metrics["val_found"] == pytest.approx(sum(counts) / 4)
    session = onnxruntime.InferenceSession(str(tmp_path / "whole" / "dense.onnx"))
    assert [i.shape for i in session.get_inputs()] == [[3, "height", "width"]]
    assert [o.name for o in session.get_outputs()] == ["boxes", "scores"]
    report = export(net, tmp_path / "part", submodule="backbone", **quiet)
    assert [v.name for v in report.variants] == ["dense", "dense.int8"]
    assert report.variants[0].metrics["val_found"] == pytest.approx(sum(counts) / 4)
    for folder in ("whole", "part"):
        runner = [sys.executable, str(tmp_path / folder / "run.py"), "--rounds", "2"]
        assert json.loads(subprocess.run(runner, capture_output=True, check=True).stdout)["ok"]


def test_the_modules_own_loaders_are_used(tmp_path):
    class Own(Net):
        def val_dataloader(self):
            return loader(1)

    report = export(Own(), tmp_path / "edge", profile=None)
    assert "val_acc" in report.variant("dense.int8").metrics
    # There is no training loader: validation batches calibrate.
    assert report.variant("dense.int8").quantization["batches"] == 6


def test_without_any_data_the_example_input_is_enough_for_a_float_file(tmp_path):
    net = Net()
    net.example_input_array = torch.zeros(1, 1, 8, 8)
    report = export(net, tmp_path / "edge", quantize=None, profile=None)
    assert report.variant("dense").missing["metrics"] == "no validation data"
    assert report.variant("dense").parity["batches"] == [1]


def test_without_any_data_nothing_is_quantized_on_made_up_numbers(tmp_path):
    net = Net()
    net.example_input_array = torch.zeros(1, 1, 8, 8)
    with pytest.raises(QuantizationError, match="nothing to calibrate with"):
        export(net, tmp_path / "edge", profile=None)
    assert list((tmp_path / "edge").iterdir()) == []


def test_a_profile_that_fails_is_missing_from_the_report_with_the_reason(tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise ProfileError("the child died")

    monkeypatch.setattr(_pipeline, "profile_files", crash)
    report = export(Net(), tmp_path / "edge", dataloaders=loader(1))
    assert sorted(hashes(tmp_path / "edge")) == ["dense.int8.onnx", "dense.onnx"]
    assert report.variant("dense").latency_ms is None
    assert report.variant("dense").missing["latency_ms"] == "the child died"
    assert any("latency profile is missing: the child died" in text for text in report.warnings)


def test_without_data_and_example_the_error_names_the_remedies(tmp_path):
    with pytest.raises(TracingError, match=r"validation data.*example_input_array.*module='"):
        export(Net(), tmp_path / "edge", quantize=None, profile=None)
    assert list((tmp_path / "edge").iterdir()) == []


@pytest.mark.parametrize("damage", ["text", "pickle", "foreign", "wrong shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, damage):
    path = tmp_path / "x.ckpt"
    state = Net().state_dict()
    if damage == "text":
        path.write_text("no checkpoint")
    elif damage == "pickle":
        torch.save({"state_dict": state, "module": nn.ReLU()}, path)
    elif damage == "foreign":
        torch.save({"something": {"a": 1}}, path)
    else:
        state["model.0.weight"] = state["model.0.weight"][:3]
        torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"x\.ckpt (cannot be read|is no checkpoint|does not fit Net)"):
        export(Net(), tmp_path / "edge", ckpt_path=path, dataloaders=loader(1), profile=None)


def test_an_unknown_submodule_names_near_ones(tmp_path):
    with pytest.raises(SelectionError, match="Did you mean 'model"):
        export(Net(), tmp_path / "edge", submodule="modell", dataloaders=loader(1))


def test_files_of_an_earlier_export_that_are_not_made_again_go(tmp_path):
    target = tmp_path / "edge"
    export(Net(), target, dataloaders=loader(1), profile=None)
    (target / "notes.txt").write_text("mine")
    assert "dense.int8.onnx" in hashes(target)
    export(Net(), target, dataloaders=loader(1), quantize=None, profile=None)
    assert sorted(hashes(target)) == ["dense.onnx"]
    assert (target / "notes.txt").exists()


def test_a_disk_that_fills_up_for_real_leaves_the_last_export(tmp_path):
    """The kernel refuses to let files grow, as a full disk would."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from export_cases import Net, hashes, loader
        from lightning_prune import export
        from lightning_prune.errors import OutputError
        target = Path(sys.argv[1])
        export(Net(), target, dataloaders=loader(1), quantize=None, profile=None)
        before = {p.name: p.read_bytes() for p in target.iterdir()}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            export(Net(), target, dataloaders=loader(1), quantize=None, profile=None)
        except OutputError as error:
            same = before == {p.name: p.read_bytes() for p in target.iterdir()}
            print(same, [p.name for p in target.parent.iterdir()] == [target.name], error)
    """
    here = str(__import__("pathlib").Path(__file__).parent)
    done = run_python("-c", textwrap.dedent(code), tmp_path / "edge", here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True True [Errno 27] cannot write: File too large; free some space"), (
        done.stdout
    )


def test_an_unwritable_target_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a dirpath"):
        export(Net(), tmp_path / "file" / "edge", dataloaders=loader(1))


def test_progress_goes_from_nothing_to_all_for_every_stage(tmp_path):
    seen = {}
    export(
        Net(), tmp_path / "edge", dataloaders=loader(1), profile=None,
        progress=lambda stage, done: seen.setdefault(stage, []).append(done),
    )  # fmt: skip
    assert list(seen) == ["export dense", "evaluate dense", "quantize dense.int8", "evaluate dense.int8"]
    for stage, values in seen.items():
        assert values[0] == 0.0, stage
        assert values[-1] == 1.0, stage
        assert all(0 <= v <= 1 for v in values), stage


def test_the_report_on_disk_is_strict_json(exported):
    data = json.loads(
        (exported[0] / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert data["schema"] == 1
    assert data["title"] == "Net"
