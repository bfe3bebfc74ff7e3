from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deploy_networks import TwoInputs
from onnx import numpy_helper
from torch import nn

from lightning_prune.deploy.onnx import OPSET, Onnx, export_onnx, with_batch_of_two
from lightning_prune.deploy.parity import check_parity
from lightning_prune.deploy.quantize import Quantize, quantize_file
from lightning_prune.deploy.runtime import OnnxModule
from lightning_prune.deploy.weights import count_weights
from lightning_prune.errors import (
    ConfigurationError,
    EvaluationError,
    ExportError,
    OutputError,
    ParityError,
    TracingError,
)


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_inputs_and_outputs_are_named_after_arguments_and_keys(two_inputs):
    _, exported = two_inputs
    file = session(exported.path)
    assert [i.name for i in file.get_inputs()] == ["image", "meta"]
    assert [o.name for o in file.get_outputs()] == ["logits", "aux_0", "aux_1"]
    assert {i.shape[0] for i in file.get_inputs()} == {"batch"}


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_gives_what_pytorch_gives_at_every_batch_size(two_inputs, batch):
    net, exported = two_inputs
    image, meta = torch.randn(batch, 3, 8, 8), torch.randn(batch, 2)
    with torch.no_grad():
        expected = net(image, meta)
    got = session(exported.path).run(None, {"image": image.numpy(), "meta": meta.numpy()})
    np.testing.assert_allclose(got[0], expected["logits"].numpy(), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(got[1], expected["aux"][0].numpy(), atol=1e-5, rtol=1e-4)
    assert np.array_equal(got[2], expected["aux"][1].numpy())


def test_the_file_can_be_called_like_the_module(two_inputs):
    net, exported = two_inputs
    function = OnnxModule(exported.path, exported.interface)
    image, meta = torch.randn(3, 3, 8, 8), torch.randn(3, 2)
    got, expected = function(image, meta=meta), net(image, meta)
    assert set(got) == {"logits", "aux"}
    assert isinstance(got["aux"], tuple)
    torch.testing.assert_close(got["logits"], expected["logits"].detach(), atol=1e-5, rtol=1e-4)
    assert function.calls == 1


def test_a_call_of_another_structure_is_an_error(two_inputs):
    _, exported = two_inputs
    function = OnnxModule(exported.path, exported.interface)
    image, meta = torch.randn(3, 3, 8, 8), torch.randn(3, 2)
    with pytest.raises(EvaluationError, match="meta=None"):
        function(image)
    with pytest.raises(EvaluationError, match=r"scale=2\.0"):
        function(image, meta, scale=2.0)


def test_the_file_holds_nothing_of_the_source(two_inputs):
    _, exported = two_inputs
    data = exported.path.read_bytes()
    for text in (b".py", b"TwoInputs", b"networks", b"torch.nn", b"site-packages", b"/home", b"stack_trace"):
        assert text not in data, text
    graph = onnx.load(str(exported.path)).graph
    assert not {v.name for v in graph.value_info} & {i.name for i in graph.initializer}
    assert {"stem.weight", "body.weight", "head.bias"} <= {i.name for i in graph.initializer}


def test_there_is_one_file_of_the_stated_opset_with_the_metadata(two_inputs):
    _, exported = two_inputs
    proto = onnx.load(str(exported.path))
    assert [p.name for p in exported.path.parent.iterdir()] == ["net.onnx"]
    assert {o.domain: o.version for o in proto.opset_import}[""] == exported.opset == OPSET
    assert proto.producer_name == "pytorch"


def test_the_file_says_what_goes_in_and_what_comes_out(two_inputs, tmp_path):
    _, exported = two_inputs

    def notes(path):
        found = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
        return {k: json.loads(v) if v.startswith("[") else v for k, v in found.items()}

    said = notes(exported.path)
    assert said["inputs"] == [
        {"name": "image", "type": "float", "shape": ["batch", 3, 8, 8]},
        {"name": "meta", "type": "float", "shape": ["batch", 2]},
    ]
    assert [(o["name"], o["type"]) for o in said["outputs"]] == [
        ("logits", "float"), ("aux_0", "float"), ("aux_1", "int64"),
    ]  # fmt: skip
    assert said["classes"] == ["a", "b"]
    assert said["normalization"] == "RGB, 0-1"
    rng = np.random.default_rng(0)
    feed = {"image": rng.random((4, 3, 8, 8), "float32"), "meta": rng.random((4, 2), "float32")}
    for mode in ("static", "dynamic"):
        done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(mode=mode), [feed])
        assert {**notes(done.path), **said} == notes(done.path)


def test_open_height_and_width(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    options = Onnx(dynamic_axes={"input": {2: "height", 3: "width"}})
    exported = export_onnx(net, tmp_path / "x.onnx", (torch.randn(2, 1, 8, 8),), {}, options)
    assert session(exported.path).get_inputs()[0].shape == ["batch", 1, "height", "width"]
    check_parity(net, exported, [((torch.randn(3, 1, 5, 7),), {}), ((torch.randn(2, 1, 16, 9),), {})])


class Detector(nn.Module):
    """Keeps what scores above a threshold: how many, depends on the data."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        out = self.head(x).flatten(2).permute(0, 2, 1).reshape(-1, 5)
        keep = torch.nonzero(out[:, 4] > 0).squeeze(1)
        order = torch.argsort(out[keep, 4], descending=True)
        return {"boxes": out[keep, :4][order], "scores": out[keep, 4][order]}


def test_a_network_whose_output_size_depends_on_the_data_goes_through_the_legacy_exporter(tmp_path):
    torch.manual_seed(0)
    net = Detector().eval()
    options = Onnx(legacy=True, opset=17)
    exported = export_onnx(net, tmp_path / "d.onnx", (torch.randn(2, 3, 8, 8),), {}, options)
    parity = check_parity(net, exported, [((torch.randn(n, 3, 8, 8),), {}) for n in (3, 4)])
    assert parity["batches"] == [3, 2, 1, 4]
    assert exported.opset == 17
    assert [o.name for o in session(exported.path).get_outputs()] == ["boxes", "scores"]
    for text in (b".py", b"Detector", b"test_onnx"):
        assert text not in exported.path.read_bytes()


class Detections(nn.Module):
    """Takes a list of pictures, as torchvision's detection networks do, and gives a dict for each."""

    def __init__(self):
        super().__init__()
        self.detector = Detector()

    def forward(self, images):
        return [self.detector(image[None]) for image in images]


@pytest.mark.parametrize("count", [1, 2])
def test_of_a_network_that_takes_a_list_of_pictures_the_file_takes_one_of_any_size(count, tmp_path):
    torch.manual_seed(0)
    net = Detections().eval()
    options = Onnx(legacy=True, dynamic_batch=False, dynamic_axes={"images": {2: "columns"}})
    call = (([torch.randn(3, 8, 12) for _ in range(count)],), {})
    exported = export_onnx(net, tmp_path / "d.onnx", *call, options)
    parity = check_parity(net, exported, [call], axes=options.dynamic_axes)
    assert parity["batches"] == []
    opened = session(exported.path)
    assert opened.get_inputs()[0].shape == [3, "height", "columns"]
    assert [o.name for o in opened.get_outputs()] == ["boxes", "scores"]
    other = [torch.randn(3, 16, 10), torch.randn(3, 8, 12), torch.randn(3, 6, 6)]
    function = OnnxModule(exported.path, exported.interface)
    for got, expected in zip(function(other), net(other), strict=True):
        assert torch.allclose(got["boxes"], expected["boxes"], atol=1e-5)
        assert len(got["scores"]) > 3
    assert function.calls == 1, "of the module, however many pictures it is called with"


class Pyramid(nn.Module):
    """Takes a list too, which is no list of pictures: one result comes of all."""

    def forward(self, features):
        return [torch.cat([f.mean((1, 2)) for f in features]), features[0].amax((1, 2))]


def test_a_list_of_which_one_result_comes_is_not_taken_apart(tmp_path):
    call = (([torch.randn(3, 8, 12), torch.randn(5, 4, 6)],), {})
    exported = export_onnx(Pyramid(), tmp_path / "p.onnx", *call, Onnx(dynamic_batch=False))
    assert check_parity(Pyramid(), exported, [call])["max_abs"] < 1e-5
    assert [i.name for i in session(exported.path).get_inputs()] == ["features_0", "features_1"]


def test_biases_that_are_alike_are_quantized_each_with_its_own_layer(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(size, 4, 3) for size in (3, 4, 4)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()
    for layer in layers:
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 3, 12, 12)
    exported = export_onnx(net, tmp_path / "a.onnx", (x,), {}, Onnx(legacy=True))
    assert check_parity(net, exported, [((x,), {})])["max_rel"] < 1e-5
    done = quantize_file(exported.path, tmp_path / "a.int8.onnx", Quantize(), [{"input": x.numpy()}])
    assert (done.integer, done.floating) == (3, ())
    near = check_parity(net, replace(exported, path=done.path), [((x,), {})], strict=False)
    assert near["max_rel"] < 0.05


def test_an_open_axis_that_the_file_has_frozen_is_found_by_parity(tmp_path):
    """Traced, the count of rows becomes a number, and no batch size would show it."""

    class Frozen(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], int(x.shape[1]) * x.shape[2]) * float(x.shape[1])

    options = Onnx(legacy=True, dynamic_axes={"x": {1: "rows"}})
    call = ((torch.randn(2, 6, 3),), {})
    exported = export_onnx(Frozen(), tmp_path / "f.onnx", *call, options)
    assert check_parity(Frozen(), exported, [call])["max_abs"] < 1e-5
    with pytest.raises(ParityError, match=r"ONNX Runtime fails on inputs \[\(2, 3, 3\)\]|differs from"):
        check_parity(Frozen(), exported, [call], axes=options.dynamic_axes)


def test_half_of_an_open_axis_that_the_network_refuses_is_not_tried(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(2))
    options = Onnx(dynamic_axes={"input": {2: "h", 3: "w"}})
    call = ((torch.randn(2, 3, 8, 8),), {})
    exported = export_onnx(net, tmp_path / "c.onnx", *call, options)
    assert check_parity(net, exported, [call], axes=options.dynamic_axes)["batches"] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 3}, "`opset` must be a whole number of at least 7"),
        ({"dynamic_axes": {"x": {0: "n"}}}, r"`dynamic_axes\['x'\]`"),
        ({"dynamic_axes": {"x": ["time"]}}, r"`dynamic_axes\['x'\]`.*write \{2: 'time'\}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Onnx(**arguments)


def test_an_opset_that_the_exporter_does_not_give_is_an_error(tmp_path):
    with pytest.raises(ExportError, match=r"[Oo]pset 12 was asked for and the exporter wrote"):
        export_onnx(nn.Linear(2, 2), tmp_path / "x.onnx", (torch.ones(1, 2),), {}, Onnx(opset=12))
    assert not list(tmp_path.iterdir())


def test_parity_is_checked_whole_at_two_and_at_one(two_inputs):
    net, exported = two_inputs
    calls = [((torch.randn(n, 3, 8, 8),), {"meta": torch.randn(n, 2)}) for n in (5, 3)]
    parity = check_parity(net, exported, calls)
    assert parity["batches"] == [5, 2, 1, 3]
    assert 0 <= parity["max_rel"] < 1e-4
    assert parity["tolerance"] == {"absolute": 1e-5, "relative": 1e-4}


def test_a_file_that_differs_from_pytorch_is_an_error(two_inputs, tmp_path):
    net, exported = two_inputs
    proto = onnx.load(str(exported.path))
    for item in proto.graph.initializer:
        if item.name == "head.bias":
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) + 0.01, item.name))
    wrong = replace(exported, path=tmp_path / "wrong.onnx")
    onnx.save(proto, str(wrong.path))
    calls = [((torch.randn(2, 3, 8, 8),), {"meta": torch.randn(2, 2)})]
    with pytest.raises(ParityError, match="'logits' differs"):
        check_parity(net, wrong, calls)
    assert check_parity(net, wrong, calls, strict=False)["max_abs"] == pytest.approx(0.01, rel=0.01)


def test_a_nan_on_one_side_only_is_a_difference(two_inputs):
    net, exported = two_inputs

    class Broken(nn.Module):
        def forward(self, image, meta=None, *, scale: float = 1.0):
            result = net(image, meta)
            return {**result, "logits": result["logits"] / 0 * 0}

    calls = [((torch.randn(2, 3, 8, 8),), {"meta": torch.randn(2, 2)})]
    with pytest.raises(ParityError, match="inf"):
        check_parity(Broken(), exported, calls)


@dataclass
class Result:
    first: torch.Tensor
    second: torch.Tensor | None = None


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Odd(nn.Module):
    """Passes an input through, ignores another, takes a nest, returns a dataclass in a tuple."""

    def forward(self, pair, ignored, flags):
        total = pair.left + pair.right
        return Result(total * 2), Pair(pair.left, total.sum()), {"flag": flags["on"], "input": total}


def test_nests_of_every_kind_go_in_and_come_out(tmp_path):
    def call(n):
        return (Pair(torch.randn(n, 2), torch.randn(n, 2)), torch.randn(n, 5), {"on": True}), {}

    args, kwargs = call(2)
    exported = export_onnx(Odd(), tmp_path / "odd.onnx", args, kwargs)
    names = [i.name for i in session(exported.path).get_inputs()]
    assert names[:2] == ["pair_left", "pair_right"]
    got, expected = OnnxModule(exported.path, exported.interface)(*(c := call(4)[0])), Odd()(*c)
    assert isinstance(got[0], Result)
    assert got[0].second is None
    assert torch.equal(got[0].first, expected[0].first)
    assert torch.equal(got[1].left, expected[1].left)
    assert torch.allclose(got[1].right, expected[1].right)
    assert got[2]["flag"] is True
    check_parity(Odd(), exported, [call(3)])


class Speech(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 6, batch_first=True, bidirectional=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x, hidden=None):
        return self.out(self.rnn(x, hidden)[0])


def export_speech(kind, path, **options):
    torch.manual_seed(0)
    net = Speech(kind).eval()
    axes = Onnx(dynamic_axes={"x": {1: "time"}}, **options)
    exported = export_onnx(net, path, (torch.randn(2, 5, 4),), {}, axes)
    calls = [((torch.randn(3, 9, 4),), {}), ((torch.randn(2, 2, 4),), {})]
    parity = check_parity(net, exported, calls)
    assert parity["batches"] == [3, 2, 1, 2]
    assert session(path).get_inputs()[0].shape == ["batch", "time", 4]
    return path.read_bytes()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_a_recurrent_network_keeps_its_open_time_axis_in_every_export_of_a_process(kind, tmp_path):
    # With the axis closed, torch compiles a loop of one length, and would keep to it.
    export_onnx(Speech(kind).eval(), tmp_path / "closed.onnx", (torch.randn(2, 5, 4),), {}, Onnx())
    assert export_speech(kind, tmp_path / "one.onnx") == export_speech(kind, tmp_path / "two.onnx")
    # Between exports, the network runs as ever.
    x = torch.randn(2, 7, 4)
    torch.manual_seed(0)
    before = Speech(kind).eval()(x)
    export_speech(kind, tmp_path / "three.onnx")
    torch.manual_seed(0)
    assert torch.equal(Speech(kind).eval()(x), before)


def test_a_plain_rnn_keeps_its_time_axis_with_the_legacy_exporter_and_is_told_so(tmp_path):
    with pytest.raises(ExportError, match=r"Axis 1 of input 'x' became the constant 5.*legacy=True"):
        export_speech(nn.RNN, tmp_path / "one.onnx")
    export_speech(nn.RNN, tmp_path / "one.onnx", legacy=True)


def test_an_unknown_dynamic_axis_names_the_inputs(tmp_path):
    with pytest.raises(TracingError, match=r"'y'.*there are: input"):
        export_onnx(
            nn.Linear(2, 2), tmp_path / "x.onnx", (torch.ones(1, 2),), {}, Onnx(dynamic_axes={"y": {1: "t"}})
        )


def test_a_module_that_fails_on_its_example_says_so(tmp_path):
    with pytest.raises(TracingError, match="Linear fails on its example input"):
        export_onnx(nn.Linear(2, 2), tmp_path / "x.onnx", (torch.ones(1, 3),))


def test_a_path_that_depends_on_values_cannot_be_exported(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match=r"Branch cannot be exported to ONNX.*module='"):
        export_onnx(Branch(), tmp_path / "x.onnx", (torch.ones(2, 3),))
    assert not list(tmp_path.iterdir())


def test_a_module_without_tensors_in_its_result_is_an_error(tmp_path):
    class Number(nn.Module):
        def forward(self, x):
            return 3

    with pytest.raises(TracingError, match="returns no tensor"):
        export_onnx(Number(), tmp_path / "x.onnx", (torch.ones(2, 3),))


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export_onnx(nn.Linear(2, 2), tmp_path / "file" / "x.onnx", (torch.ones(1, 2),))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_example_batch_becomes_two(size):
    args, kwargs = with_batch_of_two((torch.ones(size, 3), torch.ones(7)), {"m": torch.ones(size)})
    assert args[0].shape == (2, 3)
    assert args[1].shape == (7,)
    assert kwargs["m"].shape == (2,)


def test_weights_are_counted_as_pytorch_counts_them(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)).eval()
    with torch.no_grad():
        net[0].weight[:2] = 0
    exported = export_onnx(net, tmp_path / "x.onnx", (torch.ones(2, 1, 4, 4),))
    total = sum(p.numel() for p in net.parameters())
    nonzero = sum(int((p != 0).sum()) for p in net.parameters())
    assert count_weights(exported.path) == (total, nonzero)


def test_two_exports_of_one_network_are_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    net = TwoInputs().eval()
    call = ((torch.randn(2, 3, 8, 8),), {"meta": torch.randn(2, 2)})
    one = export_onnx(net, tmp_path / "a.onnx", *call).path.read_bytes()
    assert export_onnx(net, tmp_path / "b.onnx", *call).path.read_bytes() == one
