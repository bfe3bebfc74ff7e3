"""Timing layers: what is timed is the layer, and what is kept is only taken for what it was measured for."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.deploy import latency_table as lt
from lightning_prune.deploy.layer_files import grid, layer_file, network_key, observe
from lightning_prune.deploy.runtime import open_session
from lightning_prune.errors import ConfigurationError, ProfileError

LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3, 2, 1), (1, 6, 9, 9)),
    "same": (nn.Conv2d(6, 8, 3, padding="same", dilation=2), (1, 6, 9, 9)),
    "conv1d": (nn.Conv1d(6, 8, 5), (1, 6, 12)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 9, 9)),
    "multiplier": (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 9, 9)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (1, 8, 9, 9)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1), (1, 6, 5, 5)),
    "linear": (nn.Linear(6, 8), (1, 6)),
    "tokens": (nn.Linear(6, 8), (1, 7, 6)),
}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_the_file_of_a_layer_computes_what_the_layer_does(name, copies):
    layer, shape = LAYERS[name]
    (found,) = observe(layer, (torch.zeros(shape),), {})
    model = layer_file(found, *found.shape[:2], found.inputs[0], copies)
    x = torch.randn(shape)
    expected = 0
    for copy in range(copies):
        nn.init.constant_(layer.weight, (copy + 1) * 0.01)
        nn.init.constant_(layer.bias, copy * 0.1)
        expected = expected + layer(x)
    session = open_session(model.SerializeToString())
    (y,) = session.run(None, {"x": x.reshape(session.get_inputs()[0].shape).numpy()})
    assert torch.allclose(torch.from_numpy(y), expected.detach().relu().reshape(y.shape), atol=1e-4)
    assert len(model.SerializeToString()) < 2000


@pytest.mark.parametrize("name", LAYERS)
def test_the_runtime_computes_every_copy_and_makes_no_weight_anew(name, tmp_path):
    layer, shape = LAYERS[name]
    (found,) = observe(layer, (torch.zeros(shape),), {})
    model = layer_file(found, *found.shape[:2], found.inputs[0], 2)
    open_session(model.SerializeToString(), optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert sum("Conv" in node.op_type or "Gemm" in node.op_type for node in nodes) == 2
    assert not [node for node in nodes if node.op_type == "ConstantOfShape"]


def test_narrower_layers_take_the_input_that_fits():
    depthwise, shape = LAYERS["depthwise"]
    (found,) = observe(depthwise, (torch.zeros(shape),), {})
    model = layer_file(found, 4, 1, found.inputs[0], 1)
    assert open_session(model.SerializeToString()).get_inputs()[0].shape == [1, 4, 9, 9]
    conv, shape = LAYERS["conv"]
    (found,) = observe(conv, (torch.zeros(shape),), {})
    session = open_session(layer_file(found, 4, 2, found.inputs[0], 2).SerializeToString())
    assert session.get_inputs()[0].shape == [1, 2, 9, 9]


def test_layers_are_noted_as_they_are_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused, self.head = nn.Conv2d(3, 3, 1), nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)[..., ::2]).mean((2, 3)))

    net = Twice().train()
    layers = observe(net, (torch.zeros(1, 3, 4, 8),), {})
    assert [layer.weight for layer in layers] == ["conv.weight", "head.weight"]
    assert layers[0].inputs == ((1, 3, 4, 8), (1, 3, 4, 4))
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())


@given(st.integers(1, 5000))
def test_widths_are_few_and_such_that_runtimes_are_fast_at(size):
    widths = grid(size)
    assert widths == sorted(set(widths))
    assert widths[-1] == size
    assert len(widths) <= 5
    multiple = next((m for m in (16, 8, 4) if size >= 2 * m), 1)
    assert all(width % multiple == 0 for width in widths[:-1])


def test_times_are_positive_and_less_is_never_slower():
    # Large enough to be told from the clock's own unrest: at 8x8 pixels the convolution takes 0.5 us.
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 900, 10))
    layers = observe(net, (torch.zeros(1, 3, 32, 32),), {})
    times, _, target = lt.measure_layers(layers, {("0.weight", 0), ("3.weight", 1)})
    assert times["0.weight"]["first"] == [16, 32]
    assert times["0.weight"]["second"] == [3]
    assert times["3.weight"]["first"] == [10]
    for found in times.values():
        ms = np.array(found["ms"])
        assert ms.shape == (len(found["first"]), len(found["second"]))
        assert (np.diff(ms, axis=0) >= 0).all()
        assert (np.diff(ms, axis=1) >= 0).all()
    assert max(times["0.weight"]["ms"])[0] > 0
    assert "onnxruntime" in target
    assert target == lt.described(lt.Target())


def test_whole_networks_are_timed_as_files_and_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    slow = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(60)))
    times = lt.measure_networks([net, slow], (torch.zeros(1, 3, 16, 16),), {})
    assert 0 < times[0] < times[1]
    assert net.training
    assert net[0].weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_file_that_cannot_be_timed_is_named_in_the_error(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ProfileError, match=r"Timing .*broken\.onnx"):
        lt.time_files(tmp_path, [["broken.onnx"]])


TABLE = {
    "layers": {},
    "points": [[1.0, 2.0]],
    "target": "here",
    "pace": 0.1,
    "known": {},
    "network": "net",
}


def test_a_table_is_read_as_it_was_written(tmp_path):
    lt.write_table(tmp_path / "t.json", TABLE)
    assert lt.read_table(tmp_path / "t.json", "net", "here") == TABLE
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "other"}, "measured for another network"),
        ({"target": "a phone"}, r"measured for another target: it says 'a phone', and this is 'here'"),
        ({"schema": 99}, "measured for another version"),
        ({"points": None}, None),
    ],
    ids=["network", "target", "version", "complete"],
)
def test_a_stale_or_foreign_table_is_refused(tmp_path, change, message):
    path = tmp_path / "t.json"
    lt.write_table(path, TABLE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        data = json.loads(path.read_text())
        del data["points"]
        path.write_text(json.dumps(data))
        message = "is no table"
    with pytest.raises(ConfigurationError, match=rf"t\.json .*{message}.*delete the file"):
        lt.read_table(path, "net", "here")


def test_a_damaged_table_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ConfigurationError, match="no table"):
        lt.read_table(tmp_path / "t.json", "net", "here")


def test_a_network_is_known_by_its_layers_and_what_may_vary():
    def key(net, varying=()):
        return network_key(observe(net, (torch.zeros(1, 3, 8, 8),), {}), varying)

    assert key(nn.Conv2d(3, 4, 3)) == key(nn.Conv2d(3, 4, 3))
    others = [nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3, 2), nn.Sequential(nn.Conv2d(3, 4, 3))]
    keys = [key(nn.Conv2d(3, 4, 3)), *map(key, others), key(nn.Conv2d(3, 4, 3), [("weight", 0)])]
    assert len(set(keys)) == len(keys)
