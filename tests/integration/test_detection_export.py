"""Detection networks, which take a list of pictures and return one dict for each, as one whole file."""

from __future__ import annotations

import re

import onnx
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import EdgeExport, export
from lightning_prune.deploy.onnx import Onnx
from lightning_prune.errors import ParityError, TracingError

WHOLE = Onnx(legacy=True, dynamic_batch=False)


class Points(nn.Module):
    """Finds points of several classes: as many as there are, the surest first."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, 1, 1))

    def forward(self, images, targets=None):
        found, losses = [], []
        for image in images:
            scores = self.body(image[None])[0].sigmoid()
            places = (scores > 0.5).nonzero()
            values = scores[scores > 0.5]
            order = values.argsort(descending=True)
            labels, spots = places[order, 0], places[order, 1:].float()
            found.append(
                {"boxes": torch.cat([spots, spots + 2], 1), "scores": values[order], "labels": labels}
            )
            losses.append(scores.mean())
        return {"loss": torch.stack(losses).mean()} if self.training else found


class Detector(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Points()

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return self.net(images, targets)["loss"]

    def validation_step(self, batch, batch_idx):
        found = self.net(batch[0])
        self.log("val_found", sum(float(len(one["boxes"])) for one in found), batch_size=1)
        self.log("val_score", sum(one["scores"].sum() for one in found), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def pictures(sizes=((16, 20), (12, 16), (16, 12))):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    targets = [{"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.long)} for _ in images]
    rows = list(zip(images, targets, strict=True))
    return DataLoader(rows, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


def test_a_whole_detector_is_exported_quantized_and_measured_picture_by_picture(tmp_path):
    pl.seed_everything(0)
    callback = EdgeExport(str(tmp_path / "edge"), module="net", onnx=WHOLE, profile=None)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    module = Detector()
    trainer.fit(module, pictures(), pictures())
    dense, small = callback.report.variants
    for name, value in trainer.callback_metrics.items():
        assert dense.metrics[name] == pytest.approx(float(value), rel=1e-5)
        assert small.metrics[name] > 0
    assert dense.parity["rows"]["matched"] == dense.parity["rows"]["of"] > 20
    assert small.quantization["coverage"] == 1
    path = tmp_path / "edge" / "dense.onnx"
    graph = onnx.load(str(path)).graph
    assert [i.name for i in graph.input] == ["images"]
    assert [o.name for o in graph.output] == ["boxes", "scores", "labels"]
    other = torch.randn(3, 10, 14, generator=torch.Generator().manual_seed(1))
    got = onnxruntime.InferenceSession(str(path)).run(None, {"images": other.numpy()})
    (expected,) = module.eval().net([other])
    for array, tensor in zip(got, expected.values(), strict=True):
        assert torch.allclose(torch.from_numpy(array), tensor, atol=1e-5)


def test_a_list_of_pictures_without_the_options_for_it_is_an_error_that_names_them(tmp_path):
    with pytest.raises(TracingError, match=re.escape("Onnx(dynamic_batch=False, legacy=True)")):
        export(Detector(), tmp_path / "edge", dataloaders=pictures(), submodule="net", profile=None)
    assert not (tmp_path / "edge").exists() or not list((tmp_path / "edge").iterdir())


class Frozen(Points):
    """Moves what it finds by a number that the trace takes for a constant."""

    def forward(self, images, targets=None):
        shift = [float(image.sum()) for image in images]
        return [
            {**one, "boxes": one["boxes"] + move}
            for one, move in zip(super().forward(images), shift, strict=True)
        ]


def test_a_detector_that_finds_other_boxes_than_pytorch_is_refused(tmp_path):
    module = Detector()
    module.net = Frozen()
    with pytest.raises(ParityError, match="are the same"):
        export(module, tmp_path / "edge", dataloaders=pictures(), submodule="net", onnx=WHOLE, profile=None)
