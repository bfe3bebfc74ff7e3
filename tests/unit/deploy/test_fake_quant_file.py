"""Training in 8 bits and its file: the same integers, with ONNX Runtime as the judge."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from quantized_networks import MORE, NETWORKS, Plain, Residual
from torch import nn
from torch.nn import functional as F

from lightning_prune.deploy.bundle_runner import exact_session
from lightning_prune.deploy.fake_quant import grid_of
from lightning_prune.deploy.fake_quant_file import Trained, TrainedFile
from lightning_prune.deploy.fake_quant_network import FakeQuantized
from lightning_prune.deploy.fake_quant_ranges import Ranges
from lightning_prune.deploy.onnx import Onnx
from lightning_prune.deploy.weights import weights
from lightning_prune.errors import QuantizationError

INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul")
slow = [pytest.param(name, True, marks=pytest.mark.slow) for name in MORE]


def alone(tensor):
    return tensor


class Compared(FakeQuantized):
    """Compares each value that it rounds with the file's, and goes on with the file's.

    So each operator is judged by itself, and not by the ties of those before it.
    """

    file = None

    def _round(self, point, x):
        result = super()._round(point, x)
        if self.file is None:
            return result
        step = float(self.ranges.steps(point)[0].detach())
        same = [v for s, v in self.file if s == pytest.approx(step, rel=1e-6) and v.shape == result.shape]
        assert same, f"the grid of {point} is not in the file"
        distances = [np.abs(value - result.numpy()).max() for value in same]
        assert min(distances) <= 1.01 * step, point
        return torch.from_numpy(same[int(np.argmin(distances))].copy())


def trained(make, shape, target="x86-vnni", learned=False, per_channel=True, **options):
    """A network that was trained for a while in 8 bits, and what that left."""
    torch.manual_seed(0)
    network, x = make(), torch.randn(shape)
    grid = grid_of(target, per_channel)
    ranges = Ranges(grid, learned)
    rounding = Compared(grid, ranges, "", options.get("include", ["*"]), options.get("exclude", []))
    rounding.attach(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for _ in range(14 if learned else 3):
        optimizer.zero_grad()
        network(x + 0.1 * torch.randn_like(x)).square().mean().backward()
        optimizer.step()
        ranges.learn(alone)
        ranges.commit(rounding.plan.all_points, alone)
    network.eval()
    with torch.no_grad():
        expected = network(x).numpy()
    rounding.detach()
    include, exclude = tuple(rounding.include), tuple(rounding.exclude)
    state = Trained(target, per_channel, "", include, exclude, ranges)
    return network, x, state, rounding, expected


def session(path):
    """Exact on processors without VNNI too; see test_exact_sums.py."""
    return exact_session(str(path), onnxruntime.SessionOptions())


def ops(path, folder):
    """What ONNX Runtime runs, as it is by itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node]


def grids_of(path, x, folder):
    """The values on each grid of the file, in order, with their step."""
    model = onnx.load(str(path))
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    found = [
        (node.output[0], float(constants[node.input[1]]))
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants
    ]
    there = {item.name for item in model.graph.output}
    for name, _ in found:
        if name not in there:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, str(folder / "open.onnx"))
    opened = session(folder / "open.onnx")
    values = opened.run([name for name, _ in found], {opened.get_inputs()[0].name: x})
    return [(step, value) for (_, step), value in zip(found, values, strict=True)]


one_step = [(name, False) for name in ("residual", "shared", "mlp")]


@pytest.mark.parametrize(("name", "per_channel"), [*((name, True) for name in NETWORKS), *one_step, *slow])
def test_every_layer_runs_in_integers_and_every_grid_is_at_most_one_step_off(name, per_channel, tmp_path):
    make, shape, integers, floating = {**NETWORKS, **MORE}[name]
    network, x, state, rounding, expected = trained(make, shape, per_channel=per_channel)
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    run = session(done.path)
    actual = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
    found = ops(done.path, tmp_path)
    assert sum(op in INTEGER for op in found) == integers == done.integer
    assert not {"Conv", "FusedConv", "Gemm"} & set(found) or floating
    assert set(rounding.plan.floating) == floating
    rounding.file = grids_of(done.path, x.numpy(), tmp_path)
    rounding.attach(network)
    with torch.no_grad():
        followed = network(x).numpy()
    # Nothing is rounded behind the last grid: the rest is the precision of floats.
    assert actual == pytest.approx(followed, rel=1e-4, abs=1e-4 * float(np.abs(expected).max()))
    assert np.abs(actual - expected).mean() <= 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("target", "kind", "limit"),
    [("x86-avx2", np.uint8, 64), ("npu-s8s8", np.int8, 127), ("arm64", np.uint8, 127)],
)
def test_each_target_has_its_own_integers(target, kind, limit, tmp_path):
    network, x, state, _, expected = trained(Plain, (8, 3, 16, 16), target)
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(done.path)).graph.initializer}
    peaks = [np.abs(v.astype(int)).max() for n, v in constants.items() if n.endswith("weight_quantized")]
    assert peaks == [limit] * 3
    points = [v for n, v in constants.items() if n.endswith("_zero_point") and v.ndim == 0]
    assert {v.dtype for v in points} == {np.dtype(kind)}
    assert not any(v.any() for v in points) or target != "npu-s8s8"
    run = session(done.path)
    actual = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(actual - expected).max() <= 0.05 * np.abs(expected).max()


def test_one_step_for_a_whole_weight_is_that_of_the_folded_weight(tmp_path):
    network, x, state, _, _ = trained(Plain, (8, 3, 16, 16), per_channel=False)
    with torch.no_grad():
        network.a[1].weight[:2] = torch.tensor([0.0, -3.0])
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(done.path)).graph.initializer}
    conv, norm = network.a[0], network.a[1]
    folded = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    step = float(folded.detach().abs().max()) / 127
    scale, whole = constants["a.0.weight_scale"], constants["a.0.weight_quantized"]
    assert scale.shape == ()
    assert float(scale) == pytest.approx(step, rel=1e-5)
    assert not whole[0].any()
    assert np.abs(whole[1]).max() == 127
    assert np.abs(whole * step - folded.detach().numpy()).max() <= 0.501 * step


def test_learned_steps_are_the_steps_of_the_file(tmp_path):
    network, x, state, rounding, _ = trained(Residual, (8, 3, 16, 16), learned=True)
    assert set(state.ranges.logs) == rounding.plan.all_points
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(done.path)).graph.initializer}
    file = sorted(float(v) for n, v in constants.items() if n.endswith("_scale") and v.ndim == 0)
    assert file == pytest.approx(
        sorted(float(log.detach().exp()) for log in state.ranges.logs.values()), rel=1e-6
    )
    moved = [
        abs(float(log.detach().exp()) / float((e[1].clamp(min=0) - e[0].clamp(max=0)) / 255) - 1) > 1e-5
        for log, e in ((state.ranges.logs[p], state.ranges.extremes[p]) for p in state.ranges.logs)
    ]
    assert any(moved)


def test_zeros_stay_zeros_with_batch_norms_folded_in(tmp_path):
    torch.manual_seed(0)
    network, x, state, _, _ = trained(Residual, (8, 3, 16, 16))
    with torch.no_grad():
        network.bn1.weight[0] = 0.0  # folds a whole channel away
        network.bn1.weight[1] *= -1.0
        for layer in (network.conv1, network.conv2, network.head):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.5)
        network.conv2.weight[3] = 0.0
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    found = {w.source: w for w in weights(done.path)}
    for name in ("conv1", "conv2", "head"):
        zero = (getattr(network, name).weight == 0).numpy()
        assert (found[f"{name}.weight"].zero >= zero).all()


def test_weights_in_the_file_are_those_that_were_trained(tmp_path):
    network, x, state, _, _ = trained(Plain, (8, 3, 16, 16))
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(done.path)).graph.initializer}
    conv, norm = network.a[0], network.a[1]
    # By hand, on the plain weight: the batch norm only scales and turns channels.
    steps = conv.weight.detach().double().abs().amax((1, 2, 3)) / 127
    plain = torch.round(conv.weight.detach() / steps.view(-1, 1, 1, 1))
    sign = norm.weight.detach().sign().view(-1, 1, 1, 1)
    assert np.array_equal(constants["a.0.weight_quantized"], (plain * sign).numpy())
    factor = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    assert constants["a.0.weight_scale"] == pytest.approx((steps * factor).numpy(), rel=1e-5)


def test_what_is_excluded_stays_in_float_and_keeps_its_weights(tmp_path):
    network, x, state, rounding, _ = trained(Plain, (8, 3, 16, 16), exclude=["b"])
    assert rounding.plan.floating == {"b.0": "kept in float on purpose"}
    file = TrainedFile(network, state, ((x,), {}))
    assert file.layers == ["a.0", "head"]
    for exclude, integers in (((), 2), (("head",), 1)):
        done = file.write(tmp_path / "q.onnx", exclude)
        assert sum(op in INTEGER for op in ops(done.path, tmp_path)) == integers == done.integer
        assert {item["reason"] for item in done.floating} == {"kept in float on purpose"}
        constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(done.path)).graph.initializer}
        assert any(v.shape == network.b[0].weight.shape and v.dtype == np.float32 for v in constants.values())


def test_a_network_that_training_never_rounded_is_an_error():
    ranges = Ranges(grid_of("x86-vnni"))
    nothing = Trained("x86-vnni", True, "", ("*",), (), ranges)
    with pytest.raises(QuantizationError, match=r"no layer of this network.*a\.0: never run in training"):
        TrainedFile(Plain().eval(), nothing, ((torch.randn(2, 3, 16, 16),), {}))


def test_the_legacy_exporter_is_refused():
    network, x, state, _, _ = trained(Plain, (8, 3, 16, 16))
    with pytest.raises(QuantizationError, match="legacy"):
        TrainedFile(network, state, ((x,), {}), Onnx(legacy=True))


def test_exporting_leaves_the_module_as_it_was():
    network, x, state, _, _ = trained(Residual, (8, 3, 16, 16))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = network(x)
    TrainedFile(network, state, ((x,), {}))
    assert "forward" not in vars(network)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    assert torch.equal(network(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_whose_result_is_thrown_away_is_left_out(tmp_path):
    class Chatty(Plain):
        def __init__(self):
            super().__init__()
            self.extra = nn.Conv2d(16, 2, 1)

        def forward(self, x):
            self.extra(self.a(x))
            return super().forward(x)

    network, x, state, _, _ = trained(Chatty, (4, 3, 16, 16))
    assert TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx").integer == 3


def test_equal_layers_that_read_the_same_become_one(tmp_path):
    class Copied(Plain):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(8, 4)

        def forward(self, x):
            x = self.b(F.max_pool2d(self.a(x), 2)).mean((2, 3))
            return self.head(x) - 2 * self.twin(x)

    network, x, state, _, _ = trained(Copied, (8, 3, 16, 16))
    network.twin.load_state_dict(network.head.state_dict())
    done = TrainedFile(network, state, ((x,), {})).write(tmp_path / "q.onnx")
    run = session(done.path)
    actual = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
    expected = network(x).detach().numpy()
    assert np.abs(actual - expected).max() <= 0.03 * np.abs(expected).max()


def test_a_computed_weight_is_followed(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
            self.b = nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    network, x, state, _, _ = trained(Normed, (4, 3, 8, 8))
    file = TrainedFile(network, state, ((x,), {}))
    assert file.layers == ["a", "b"]
    assert file.write(tmp_path / "q.onnx").integer == 2
