from __future__ import annotations

import copy

import lightning.pytorch
import numpy as np
import onnxruntime
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, ConfusionMatrix

from lightning_prune.deploy.calls import submodule
from lightning_prune.deploy.evaluate import evaluate_file, ready
from lightning_prune.deploy.onnx import export_onnx
from lightning_prune.errors import EvaluationError

pytestmark = [
    # Lightning 2.6 still uses a name that torch's pytree is giving up.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"),
]
NAMESPACES = [pytorch_lightning, lightning.pytorch]


def make(base):
    class Net(base):
        """Logs from a torchmetrics object, a plain number, and at the epoch's end."""

        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.acc = Accuracy("multiclass", num_classes=3)
            self.matrix = ConfusionMatrix("multiclass", num_classes=3)

        def forward(self, x):
            return self.model(x)

        def logits(self, x):
            return self(x)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            out = self.logits(x)
            self.acc(out, y)
            self.matrix.update(out, y)
            self.log("val_acc", self.acc)
            self.log("val_loss", nn.functional.cross_entropy(out, y))

        def on_validation_epoch_end(self):
            matrix = self.matrix.compute().float()
            self.log("recall_0", matrix[0, 0] / matrix[0].sum())
            self.matrix.reset()

    torch.manual_seed(0)
    return Net()


def loader(seed=0, n=50):
    g = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)), 16
    )


def exported(net, tmp_path, name=None):
    return export_onnx(copy.deepcopy(submodule(net, name)), tmp_path / "net.onnx", (torch.randn(2, 4),))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda n: n.__name__)
def test_metrics_are_those_of_the_file(namespace, tmp_path):
    net = make(namespace.LightningModule)
    file = exported(net, tmp_path)
    # A different network than the file, so that its own forward would give other numbers.
    other = make(namespace.LightningModule)
    with torch.no_grad():
        other.model[2].bias += torch.tensor([5.0, 0.0, 0.0])
    metrics = evaluate_file(other, file, loader())
    session = onnxruntime.InferenceSession(str(file.path))
    data = loader().dataset.tensors
    out = session.run(None, {"x": data[0].numpy()})[0]
    labels = data[1].numpy()
    assert metrics["val_acc"] == pytest.approx((out.argmax(1) == labels).mean())
    assert metrics["recall_0"] == pytest.approx((out.argmax(1) == 0)[labels == 0].mean())
    log = out - np.log(np.exp(out).sum(1, keepdims=True))
    assert metrics["val_loss"] == pytest.approx(-log[np.arange(50), labels].mean(), rel=1e-5)


def test_the_module_stays_untouched(tmp_path):
    net = make(pytorch_lightning.LightningModule).train()
    file = exported(net, tmp_path)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    evaluate_file(net, file, loader())
    assert net.training
    assert "forward" not in vars(net)
    assert net._trainer is None
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_submodule_is_replaced_where_the_loop_calls_it(tmp_path):
    class Inner(make(pytorch_lightning.LightningModule).__class__):
        def logits(self, x):
            return self.model(x)

    net = Inner()
    metrics = evaluate_file(net, exported(net, tmp_path, "model"), loader(), module_name="model")
    assert set(metrics) == {"val_acc", "val_loss", "recall_0"}


def test_a_loop_that_never_calls_it_is_an_error_that_names_the_fix(tmp_path):
    class Inner(make(pytorch_lightning.LightningModule).__class__):
        def logits(self, x):
            return self.model(x)

    net = Inner()
    with pytest.raises(EvaluationError, match=r"never calls Inner\.forward.*module='model'"):
        evaluate_file(net, exported(net, tmp_path), loader())


def test_a_loop_that_fails_on_the_file_says_where(tmp_path):
    class Failing(make(pytorch_lightning.LightningModule).__class__):
        def on_validation_epoch_end(self):
            raise KeyError("missing")

    net = Failing()
    with pytest.raises(EvaluationError, match=r"fails when net\.onnx takes the place.*KeyError"):
        evaluate_file(net, exported(net, tmp_path), loader())


def test_several_loaders_are_told_apart(tmp_path):
    class Two(make(pytorch_lightning.LightningModule).__class__):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            out = self(batch[0])
            self.log("acc", (out.argmax(1) == batch[1]).float().mean())

        def on_validation_epoch_end(self):
            return None

    net = Two()
    metrics = evaluate_file(net, exported(net, tmp_path), [loader(0), loader(1)])
    assert set(metrics) == {"acc/dataloader_idx_0", "acc/dataloader_idx_1"}


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.5, 2), (1.0, 4)])
def test_the_limit_of_the_fit_holds(tmp_path, limit, batches):
    net = make(pytorch_lightning.LightningModule)
    done = []
    evaluate_file(net, exported(net, tmp_path), loader(), limit=limit, on_batch=done.append)
    assert done == list(range(1, batches + 1))


def test_the_datamodule_moves_batches_and_is_not_set_up_again(tmp_path):
    class Data(pytorch_lightning.LightningDataModule):
        setups = 0

        def setup(self, stage):
            self.setups += 1

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0, batch[1]

        def val_dataloader(self):
            raise AssertionError("the loaders are given")

    net, data = make(pytorch_lightning.LightningModule), Data()
    metrics = evaluate_file(net, exported(net, tmp_path), loader(), datamodule=data)
    constant = int(net(torch.zeros(1, 4)).argmax())
    assert metrics["val_acc"] == pytest.approx(
        float((loader().dataset.tensors[1] == constant).float().mean())
    )
    assert data.setups == 0
    assert data.trainer is None


def test_nothing_is_printed_or_warned_about(tmp_path, capfd):
    net = make(pytorch_lightning.LightningModule)
    file = exported(net, tmp_path)
    capfd.readouterr()
    evaluate_file(net, file, loader())
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_a_prepared_datamodule_makes_one_process_wait_for_no_other():
    """Around a `prepare_data` of the user's Lightning builds a process group, which needs all ranks."""

    class Data(pytorch_lightning.LightningDataModule):
        def prepare_data(self):
            raise AssertionError("it was prepared before")

    assert is_overridden("prepare_data", Data())
    twin = ready(Data(), "loaders")
    assert not is_overridden("prepare_data", twin)
    assert twin.val_dataloader() == "loaders"
    twin.prepare_data()
