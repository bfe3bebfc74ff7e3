from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from lightning_prune.deploy import fusion, quantize
from lightning_prune.deploy.onnx import export_onnx
from lightning_prune.deploy.parity import check_parity
from lightning_prune.deploy.quantize import CALIBRATIONS, TARGETS, Quantize, quantize_file
from lightning_prune.deploy.weights import count_weights, lost_zeros
from lightning_prune.errors import ConfigurationError, OutputError, QuantizationError


def arrays(path):
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer}


def optimized_ops(path, folder):
    """What ONNX Runtime runs, seen without the package's own reader."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def outputs(path, feed):
    options = onnxruntime.SessionOptions()
    # Exact on processors without VNNI too.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
        None, feed
    )[0]


def test_static_is_u8_activations_and_s8_weights_per_channel(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), feeds)
    graph = onnx.load(str(done.path)).graph
    kinds = {i.name: i.data_type for i in graph.initializer}
    activations = {kinds[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert activations == {TensorProto.UINT8}
    for name, channels in (("0", 8), ("2", 8), ("5", 8), ("8", 16), ("10", 4)):
        weight = arrays(done.path)[f"{name}.weight_quantized"]
        assert weight.dtype == np.int8
        assert arrays(done.path)[f"{name}.weight_scale"].size == channels
        assert not arrays(done.path)[f"{name}.weight_zero_point"].any()


def test_a_weight_has_one_step_for_all_channels_on_request(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(per_channel=False), feeds)
    steps = {name: value for name, value in arrays(done.path).items() if name.endswith("weight_scale")}
    assert len(steps) == 5
    assert {value.size for value in steps.values()} == {1}
    assert done.coverage == 1.0
    with pytest.raises(ConfigurationError, match="`per_channel` must be true or false"):
        Quantize(per_channel="no")


@pytest.mark.parametrize(("padding", "ops"), [(0, "QLinearAveragePool"), (1, "AveragePool")])
def test_an_average_pool_that_goes_over_the_edge_divides_by_what_it_saw(padding, ops, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(3, 2, padding, ceil_mode=True)).eval()
    x = torch.rand(4, 3, 10, 10)
    exported = export_onnx(net, tmp_path / "m.onnx", (x,), {})
    feed = {"input": x.numpy()}
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), [feed])
    expected = net(x).detach().numpy()
    # ONNX Runtime's integer kernel alone is off by a third at the edges.
    assert np.abs(outputs(done.path, feed) - expected).max() <= 0.03 * expected.max()
    assert ops in optimized_ops(done.path, tmp_path)


def test_every_compute_operator_runs_in_integers(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), feeds)
    assert (done.integer, done.floating, done.coverage) == (5, (), 1.0)
    ops = optimized_ops(done.path, tmp_path)
    assert (ops.count("QLinearConv"), ops.count("QGemm")) == (3, 2)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(ops)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_zeros_stay_zero_and_outputs_stay_near(sparse_chain, tmp_path, target, calibration):
    net, exported, feeds = sparse_chain
    config = Quantize(target=target, calibration=calibration)
    done = quantize_file(exported.path, tmp_path / "q.onnx", config, feeds)
    quantized = arrays(done.path)
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1 and f"{name}_quantized" in quantized:
            zeros = parameter.detach().numpy() == 0
            assert not quantized[f"{name}_quantized"][zeros].any()
    calls = [((torch.from_numpy(feed["input"]),), {}) for feed in feeds]
    assert check_parity(net, replace(exported, path=done.path), calls, strict=False)["max_rel"] < 0.15


def test_avx2_weights_keep_seven_bits(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(target="x86-avx2"), feeds)
    largest = max(
        np.abs(v.astype(int)).max() for k, v in arrays(done.path).items() if k.endswith("weight_quantized")
    )
    assert 32 < largest <= 64


@pytest.mark.parametrize("layer", ["0", "2", "5", "8", "10"])
def test_an_excluded_layer_really_runs_in_float(sparse_chain, tmp_path, layer):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(exclude=[layer]), feeds)
    assert [item["name"] for item in done.floating] == [layer]
    assert done.floating[0]["reason"] == "kept in float on purpose"
    ops = optimized_ops(done.path, tmp_path)
    assert sum(op in ("Conv", "FusedConv", "Gemm") for op in ops) == 1
    assert sum(op in ("QLinearConv", "QGemm") for op in ops) == 4


def test_without_our_help_onnxruntime_quantizes_an_excluded_layer(sparse_chain, tmp_path, monkeypatch):
    """If this fails, WeightBiasQuantization is gone and `held_in_float` can go too."""
    _, exported, feeds = sparse_chain
    monkeypatch.setattr(quantize, "held_in_float", lambda proto, nodes: proto)
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(exclude=["2"]), feeds)
    assert "2.weight_quantized" not in arrays(done.path)
    assert done.floating == ()


def test_all_excluded_is_the_float_file(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(exclude=["*"]), feeds)
    assert done.integer == 0
    assert len(done.floating) == 5


def test_an_exclude_that_matches_nothing_names_near_layers(two_inputs, tmp_path):
    _, exported = two_inputs
    with pytest.raises(QuantizationError, match=r"'bodi'.*Did you mean 'body'"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(exclude=["bodi"]), [{}])


def test_signed_activations_leave_residual_convolutions_in_float_and_say_so(two_inputs, tmp_path):
    _, exported = two_inputs
    rng = np.random.default_rng(0)
    feed = {"image": rng.random((4, 3, 8, 8), "float32"), "meta": rng.random((4, 2), "float32")}
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(target="npu-s8s8"), [feed])
    assert done.floating
    assert done.coverage < 1
    assert done.summary()["float_operators"][0]["reason"]


def test_dynamic_quantizes_linear_layers_and_leaves_convolutions(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(mode="dynamic"), [])
    ops = optimized_ops(done.path, tmp_path)
    assert "ConvInteger" not in ops
    assert done.integer == 2
    assert lost_zeros(exported.path, done.path) == {}
    got, expected = outputs(done.path, feeds[0]), outputs(exported.path, feeds[0])
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_the_same_data_gives_the_same_bytes(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    one = quantize_file(exported.path, tmp_path / "a.onnx", Quantize(), feeds).path.read_bytes()
    assert quantize_file(exported.path, tmp_path / "b.onnx", Quantize(), feeds).path.read_bytes() == one


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_calibration_reads_batch_by_batch_and_as_many_as_asked(sparse_chain, tmp_path, calibration):
    _, exported, feeds = sparse_chain
    seen, done = [], []

    class Feeds(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    config = Quantize(calibration=calibration, batches=3)
    result = quantize_file(exported.path, tmp_path / "q.onnx", config, Feeds(feeds), on_batch=done.append)
    assert seen == [0, 1, 2]
    assert done == [1, 2, 3]
    assert result.batches == 3


def test_ranges_cover_all_batches_and_not_just_the_last(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    spread = [{"input": feed["input"] * factor} for feed, factor in zip(feeds, (1, 9, 1, 1), strict=True)]
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), spread)
    low = min(float(feed["input"].min()) for feed in spread)
    high = max(float(feed["input"].max()) for feed in spread)
    assert arrays(done.path)["input_scale"] == pytest.approx((high - low) / 255, rel=1e-3)


def test_nothing_to_calibrate_with_is_an_error(sparse_chain, tmp_path):
    _, exported, _ = sparse_chain
    with pytest.raises(QuantizationError, match="nothing to calibrate with"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(sparse_chain, tmp_path, value):
    _, exported, feeds = sparse_chain
    bad = {"input": feeds[1]["input"].copy()}
    bad["input"][0, 0, 0, 0] = value
    with pytest.raises(QuantizationError, match="batch 1 has values in input 'input' that are not finite"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), [feeds[0], bad])
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net[2].weight[0, 0, 0, 0] = torch.nan
    exported = export_onnx(net, tmp_path / "float.onnx", (torch.ones(1, 3, 8, 8),), {})
    feeds = [{"input": np.ones((1, 3, 8, 8), "float32")}]
    with pytest.raises(QuantizationError, match=r"weights that are not finite, in 2\.weight"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), feeds)


def test_a_wrong_feed_is_an_error(sparse_chain, tmp_path):
    _, exported, _ = sparse_chain
    with pytest.raises(QuantizationError, match="could not be quantized"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), [{"other": np.ones(1, "float32")}])


def test_a_lost_zero_is_an_error_and_leaves_no_file(sparse_chain, tmp_path, monkeypatch):
    _, exported, feeds = sparse_chain
    genuine = quantize.held_in_float

    def spoiled(proto, nodes):
        genuine(proto, nodes)
        for item in proto.graph.initializer:
            if item.name == "2.weight_quantized":
                values = numpy_helper.to_array(item).copy()
                values[values == 0] = 1
                item.CopyFrom(numpy_helper.from_array(values, item.name))
        return proto

    monkeypatch.setattr(quantize, "held_in_float", spoiled)
    with pytest.raises(QuantizationError, match=r"zeros.*'2\.weight'"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), feeds)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_output_error_and_leaves_no_file(sparse_chain, tmp_path, monkeypatch):
    _, exported, feeds = sparse_chain

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "_static", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), feeds)
    assert not list(tmp_path.iterdir())


def test_quantization_says_nothing_on_the_terminal(sparse_chain, tmp_path, capfd, caplog):
    _, exported, feeds = sparse_chain
    with caplog.at_level(logging.INFO):
        quantize_file(exported.path, tmp_path / "q.onnx", Quantize(calibration="entropy"), feeds)
    assert capfd.readouterr() == ("", "")


def test_int8_counts_the_same_weights_as_float(sparse_chain, tmp_path):
    net, exported, feeds = sparse_chain
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), feeds)
    total, nonzero = count_weights(exported.path)
    assert count_weights(done.path)[0] == total
    # Rounding may add zeros; it takes none away.
    assert 0.9 * nonzero < count_weights(done.path)[1] <= nonzero
    assert total == sum(
        p.numel() for p in nn.Sequential(*[m for i, m in enumerate(net) if i != 3]).parameters()
    )


def test_a_layer_is_named_by_its_weight(two_inputs):
    _, exported = two_inputs
    assert sorted(fusion.layers_of(exported.path).values()) == ["body", "extra", "head", "stem"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "qat"}, "`mode` must be one of static, dynamic"),
        ({"target": "x86-vnn"}, r"`target`.*Did you mean 'x86-vnni'"),
        ({"calibration": "distribution"}, r"`calibration`.*destroys the accuracy"),
        ({"calibration": "max"}, "`calibration` must be one of minmax"),
        ({"batches": 0}, "`batches` must be a whole number of at least 1, got 0"),
        ({"batches": True}, "`batches` must be a whole number"),
        ({"source": "test"}, "`source` must be one of train, val"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Quantize(**arguments)


def test_lstm_is_quantized_dynamically_only(tmp_path):
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 16, batch_first=True)
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    torch.manual_seed(0)
    exported = export_onnx(Speech(), tmp_path / "s.onnx", (torch.randn(2, 5, 8),))
    feed = {"x": np.random.default_rng(0).standard_normal((3, 5, 8)).astype("float32")}
    static = quantize_file(exported.path, tmp_path / "static.onnx", Quantize(), [feed])
    assert [item["op"] for item in static.floating] == ["LSTM"]
    dynamic = quantize_file(exported.path, tmp_path / "dynamic.onnx", Quantize(mode="dynamic"), [])
    assert "DynamicQuantizeLSTM" in optimized_ops(dynamic.path, tmp_path)
    got, expected = outputs(dynamic.path, feed), outputs(exported.path, feed)
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_a_weight_that_two_layers_share_survives_dynamic_quantization(tmp_path):
    """ONNX Runtime transposes it once for each layer: a square one comes out wrong without a word."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    exported = export_onnx(Tied(), tmp_path / "t.onnx", (torch.randn(2, 16),))
    done = quantize_file(exported.path, tmp_path / "q.onnx", Quantize(mode="dynamic"), [])
    feed = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype("float32")}
    got, expected = outputs(done.path, feed), outputs(exported.path, feed)
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    assert done.integer == 2
