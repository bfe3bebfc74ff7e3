from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_prune.deploy.fake_quant import (
    Grid,
    fake_quantize,
    fake_quantize_weight,
    grid_of,
    steps_of,
    weight_scales,
    whole_weight,
)
from lightning_prune.deploy.fake_quant_network import FakeQuantized
from lightning_prune.deploy.fake_quant_ranges import Ranges

SIGNED = grid_of("npu-s8s8")


def alone(tensor):
    return tensor


def by_onnxruntime(x, scale, zero, signed):
    """QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    kind, number = (np.int8, onnx.TensorProto.INT8) if signed else (np.uint8, onnx.TensorProto.UINT8)
    names = ["x", "scale", "zero"]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", names, ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    kinds = [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, number]
    shapes = [[None], [], []]
    inputs = [onnx.helper.make_tensor_value_info(*item) for item in zip(names, kinds, shapes, strict=True)]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])
    graph = onnx.helper.make_graph(nodes, "g", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"x": x, "scale": np.array(scale, np.float32), "zero": np.array(zero, kind)}
    return session.run(None, feed)[0]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(2**-10, 2**10, width=32),
    st.integers(0, 255),
    st.booleans(),
)
def test_rounding_is_bitwise_that_of_onnxruntime(values, scale, zero, signed):
    grid = SIGNED if signed else Grid()
    zero = 0 if signed else zero
    ties = [scale * (n + 0.5) for n in range(-3, 4)]
    x = np.array([*values, *ties], np.float32)
    ours = fake_quantize(torch.from_numpy(x), torch.tensor(scale), torch.tensor(float(zero)), grid)
    assert np.array_equal(ours.numpy(), by_onnxruntime(x, scale, zero, signed))


@given(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32), st.sampled_from([Grid(), SIGNED]))
def test_zero_is_always_on_the_grid_and_the_range_is_covered(one, other, grid):
    low, high = torch.tensor(min(one, other)), torch.tensor(max(one, other))
    scale, zero = steps_of(low, high, grid)
    assert float(fake_quantize(torch.zeros(1), scale, zero, grid)) == 0.0
    ends = torch.stack([low.clamp(max=0), high.clamp(min=0)])
    rounded = fake_quantize(ends, scale, zero, grid)
    assert (rounded - ends).abs().max() <= 0.51 * scale


def test_gradients_pass_inside_the_range_and_stop_outside():
    x = torch.tensor([-2.0, -0.5, 0.3, 1.9, 30.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.01), torch.tensor(100.0), Grid())
    y.backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0, 0.0]


def test_the_step_gets_the_gradient_of_learned_step_size_quantization():
    torch.manual_seed(0)
    x = torch.randn(1000) * 2
    scale = torch.tensor(0.02, requires_grad=True)
    fake_quantize(x, scale, torch.tensor(90.0), Grid()).square().sum().backward()
    # By autograd, with the straight-through estimator written out.
    again = torch.tensor(0.02, requires_grad=True)
    steps = (x / again).clamp(-90, 165)
    rounded = steps + (steps.round() - steps).detach()
    (rounded * again).square().sum().backward()
    assert float(scale.grad) == pytest.approx(float(again.grad) / (1000 * 255) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_precision_is_rounded_in_float32_and_kept(dtype):
    x = torch.linspace(-1, 1, 101).to(dtype)
    y = fake_quantize(x, torch.tensor(0.01), torch.tensor(100.0), Grid())
    assert y.dtype == dtype
    expected = fake_quantize(x.float(), torch.tensor(0.01), torch.tensor(100.0), Grid()).to(dtype)
    assert torch.allclose(y.float(), expected.float(), atol=1e-6)
    assert fake_quantize_weight(x.view(1, -1), 127).dtype == dtype


@given(st.integers(0, 2**16), st.sampled_from([(4, 3), (5, 2, 3, 3), (6, 1, 3)]), st.sampled_from([127, 64]))
def test_weights_keep_their_zeros_and_their_largest_and_are_half_a_step_off_at_most(seed, shape, limit):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10 ** torch.randn(1, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.4] = 0.0
    weight[0] = 0.0
    rounded = fake_quantize_weight(weight, limit)
    scales = weight_scales(weight, limit).view(-1, *[1] * (weight.dim() - 1))
    assert (rounded[weight == 0] == 0).all()
    assert ((rounded - weight).abs() <= 0.5001 * scales).all()
    assert torch.allclose(rounded.flatten(1).abs().amax(1), weight.flatten(1).abs().amax(1), rtol=1e-6)
    assert whole_weight(weight, limit)[0].abs().max() <= limit


def test_the_gradient_of_a_weight_passes_whole():
    weight = torch.randn(3, 4, requires_grad=True)
    gradient = torch.randn(3, 4)
    fake_quantize_weight(weight, 127).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@given(st.integers(0, 2**16))
def test_folding_a_batch_norm_changes_no_integer_but_its_sign(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 10, generator=generator)
    factor = torch.randn(6, 1, generator=generator)
    folded, plain = whole_weight(weight * factor, 127)[0], whole_weight(weight, 127)[0]
    assert ((folded - plain * factor.sign()).abs() <= 1).all()
    assert ((folded - plain * factor.sign()) == 0).float().mean() > 0.9


class TestRanges:
    def test_first_batches_are_averaged_and_later_ones_move_the_average(self):
        ranges = Ranges(Grid())
        for number in range(300):
            ranges.observe("a", torch.tensor([-1.0, 1.0 if number < 200 else 3.0]))
            ranges.commit(["a"], alone)
            if number == 3:
                assert ranges.extremes["a"].tolist() == [-1.0, 1.0]
        assert ranges.extremes["a"][0] == -1.0
        assert float(ranges.extremes["a"][1]) == pytest.approx(3 - 2 * 0.99**100, rel=1e-3)

    def test_a_batch_with_infinities_does_not_count(self):
        ranges = Ranges(Grid())
        for value in (1.0, float("inf"), float("nan")):
            ranges.observe("a", torch.tensor([0.0, value]))
            ranges.commit(["a"], alone)
        assert ranges.extremes["a"].tolist() == [0.0, 1.0]
        assert ranges.batches == {"a": 1}

    def test_a_point_that_one_process_did_not_pass_does_not_count(self):
        ranges = Ranges(Grid())
        ranges.observe("a", torch.tensor([0.0, 1.0]))
        ranges.commit(["a", "b"], alone)
        assert "a" in ranges
        assert "b" not in ranges

    def test_processes_have_the_average_of_their_extremes(self):
        ranges = Ranges(Grid())
        ranges.observe("a", torch.tensor([0.0, 1.0]))
        ranges.commit(["a"], lambda tensor: tensor + 1)
        assert ranges.extremes["a"].tolist() == [1.0, 2.0]

    def test_a_learned_step_moves_against_its_gradient_by_its_rate_whatever_the_loss(self):
        moved = []
        for factor in (1.0, 1e-4, 1e4):
            ranges = Ranges(Grid(), learned=True)
            for _ in range(10):
                ranges.observe("a", torch.tensor([0.0, 2.55]))
                ranges.commit(["a"], alone)
            before = float(ranges.logs["a"].detach())
            for _ in range(5):
                scale, zero = ranges.steps("a")
                (factor * fake_quantize(torch.tensor([9.0]), scale, zero, Grid())).sum().backward()
                ranges.learn(alone, loss_scale=factor)
            moved.append(float(ranges.logs["a"].detach()) - before)
        assert moved == pytest.approx([-5e-3] * 3, rel=1e-3)

    def test_a_learned_step_never_passes_what_clips_in_front_of_it(self):
        ranges = Ranges(Grid(), learned=True)
        ranges.logs["a"], ranges.zeros["a"] = torch.tensor(1.0).log(), torch.tensor(0.0)
        ranges.ceilings = {"a": 6.0}
        assert float(ranges.steps("a")[0]) * 255 == pytest.approx(6.0)

    def test_state_goes_round(self):
        ranges = Ranges(Grid(), learned=True)
        for _ in range(12):
            ranges.observe("a", torch.randn(50))
            ranges.commit(["a"], alone)
        again = Ranges(Grid(), learned=True)
        again.load_state_dict(ranges.state_dict())
        assert [float(s.detach()) for s in again.steps("a")] == [float(s.detach()) for s in ranges.steps("a")]


class Branching(nn.Module):
    """Does other things in training than in evaluation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aside = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.inside = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.training:
            x = F.dropout(x, 0.0) * 1.0
            self.aside(x)
        return self.b(self.inside(x)) + x


def rounding(module, **options):
    ranges = Ranges(Grid())
    found = FakeQuantized(Grid(), ranges, options.get("root", ""), options.get("include", ["*"]))
    found.attach(module)
    return found, ranges


def test_the_same_places_are_rounded_in_training_and_in_evaluation():
    network, x = Branching(), torch.randn(16, 4)
    found, ranges = rounding(network)
    network(x)
    ranges.commit(found.plan.all_points, alone)
    assert {layer.name for layer in found.plan.layers.values()} == {"a", "b", "inside.0"}
    assert set(ranges.extremes) == found.plan.all_points
    network.eval()
    rounded = network(x)
    found.detach()
    difference = (rounded - network(x)).abs().max()
    assert 0 < difference < 0.05


def test_looking_at_a_network_leaves_no_trace_on_it():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    other.load_state_dict(network.state_dict())
    x = torch.randn(8, 1, 6, 6)
    rounding(network)
    torch.manual_seed(1)
    network(x)
    torch.manual_seed(1)
    other(x)
    assert network.training
    assert network[1].num_batches_tracked == other[1].num_batches_tracked == 1
    # The same dropout: no random number was drawn in between.
    torch.manual_seed(1)
    network(x)
    first = torch.rand(3)
    torch.manual_seed(1)
    other(x)
    assert torch.equal(first, torch.rand(3))


def test_a_submodule_that_is_called_alone_is_rounded_too_as_in_activation_checkpointing():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
            self.last, self.thrifty = nn.Linear(8, 2), False

        def forward(self, x):
            if self.thrifty:
                x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
            else:
                x = self.first(x)
            return self.last(torch.relu(x))

    torch.manual_seed(0)
    network, x = Body(), torch.randn(32, 4, requires_grad=True)
    found, ranges = rounding(network)
    network(x)
    ranges.commit(found.plan.all_points, alone)
    network.eval()
    gradients = []
    for network.thrifty in (False, True):
        gradients.append(torch.autograd.grad(network(x).square().sum(), list(network.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_an_error_in_the_network_leaves_nothing_running():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fail = nn.Linear(3, 3), False

        def forward(self, x):
            x = self.a(x)
            if self.fail:
                raise RuntimeError("the user's own error")
            return x

    network, x = Failing(), torch.randn(2, 3)
    found, _ = rounding(network)
    network(x)
    network.fail = True
    with pytest.raises(RuntimeError, match="the user's own error"):
        network(x)
    network.fail = False
    network(x)
    found.detach()
    assert not torch.overrides._len_torch_function_stack()
    assert "forward" not in vars(network)


def test_a_copy_rounds_by_itself():
    import copy

    network, x = Branching(), torch.randn(16, 4)
    found, ranges = rounding(network)
    network(x)
    ranges.commit(found.plan.all_points, alone)
    twin = copy.deepcopy(network).eval()
    network.eval()
    assert torch.equal(twin(x), network(x))
    twin.train()
    twin(100 * x)
    ranges.commit(found.plan.all_points, alone)
    assert all(float(e.abs().max()) < 50 for e in ranges.extremes.values())


def test_only_what_is_included_is_rounded_and_the_rest_has_its_reason():
    network, x = Branching(), torch.randn(4, 4)
    found, _ = rounding(network, include=["b"])
    network(x)
    assert {layer.name for layer in found.plan.layers.values()} == {"b"}
    assert found.plan.floating == dict.fromkeys(["a", "inside.0"], "kept in float on purpose")


def test_what_was_changed_in_place_is_not_followed():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            x.clamp_(-1, 1)
            return self.b(x)

    network, x = InPlace(), torch.randn(4, 4)
    found, _ = rounding(network)
    network.eval()
    network(x)
    assert found.plan.floating.keys() == {"b"}
    assert "changed in place" in found.plan.floating["b"]
