"""8-bit sums are those of integers on every processor; x86 without VNNI adds in 16 bits, and overflows."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_prune import runtime
from lightning_prune.deploy import bundle_runner
from lightning_prune.deploy._profile_child import open_onnxruntime
from lightning_prune.deploy.bundle_runner import exact_session, sums_overflow
from lightning_prune.deploy.environment import environment, lacks_vnni
from lightning_prune.deploy.runtime import open_session
from lightning_prune.runtime import _opener

WEIGHTS = np.stack([np.full((16, 3, 3), 127), np.random.default_rng(0).integers(-127, 128, (16, 3, 3))])
INPUTS = np.random.default_rng(1).integers(200, 256, (1, 16, 5, 5))


def quantized(shared: bool) -> onnx.ModelProto:
    """One convolution of large numbers, or two of the same weights, in steps of 1/256 and 1/64."""
    constants = {
        "sx": np.float32(2**-8), "zx": np.uint8(0), "w": WEIGHTS.astype(np.int8),
        "sw": np.full(2, 2**-6, np.float32), "zw": np.zeros(2, np.int8),
        "sy": np.float32(2), "zy": np.uint8(100),
    }  # fmt: skip
    nodes = [helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0)]
    for i in range(1 + shared):
        nodes += [
            helper.make_node("QuantizeLinear", [f"x{i}", "sx", "zx"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", "sx", "zx"], [f"d{i}"]),
            helper.make_node("Conv", [f"d{i}", "wf"], [f"c{i}"]),
            helper.make_node("QuantizeLinear", [f"c{i}", "sy", "zy"], [f"p{i}"]),
            helper.make_node("DequantizeLinear", [f"p{i}", "sy", "zy"], [f"y{i}"]),
        ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(f"x{i}", TensorProto.FLOAT, [1, 16, 5, 5]) for i in range(1 + shared)],
        [value(f"y{i}", TensorProto.FLOAT, [1, 2, 3, 3]) for i in range(1 + shared)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def expected() -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(INPUTS[0], (3, 3), axis=(1, 2))
    sums = np.einsum("cijhw,ochw->oij", windows, WEIGHTS)
    return 2.0 * (np.clip(np.rint(sums * 2.0**-15) + 100, 0, 255) - 100)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", ["evaluation", "runner", "profile", "elastic"])
def test_sums_do_not_overflow(tmp_path, way, shared):
    path = tmp_path / "q.onnx"
    onnx.save(quantized(shared), str(path))
    opened = {
        "evaluation": lambda: open_session(path),
        "runner": lambda: exact_session(str(path), onnxruntime.SessionOptions()),
        "profile": lambda: open_onnxruntime(str(path), {"threads": 1})[2],
        "elastic": lambda: _opener(["CPUExecutionProvider"], None)(path),
    }[way]()
    x = (INPUTS * 2.0**-8).astype(np.float32)
    for y in opened.run(None, {f"x{i}": x for i in range(1 + shared)}):
        np.testing.assert_array_equal(y[0], expected())


@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_a_dynamic_file_do_not_overflow_in_evaluation(tmp_path, shared):
    """Two steps of a recurrent network, say, have one weight."""
    weights = np.random.default_rng(2).integers(-127, 128, (64, 8))
    x = np.random.default_rng(3).integers(200, 256, (4, 64))
    nodes = [
        helper.make_node("MatMulInteger", [f"x{i}", "w", "zx", "zw"], [f"y{i}"]) for i in range(1 + shared)
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(f"x{i}", TensorProto.UINT8, [4, 64]) for i in range(1 + shared)],
        [value(f"y{i}", TensorProto.INT32, [4, 8]) for i in range(1 + shared)],
        [
            numpy_helper.from_array(weights.astype(np.int8), "w"),
            numpy_helper.from_array(np.uint8(0), "zx"),
            numpy_helper.from_array(np.int8(0), "zw"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = open_session(model.SerializeToString())
    for y in session.run(None, {f"x{i}": x.astype(np.uint8) for i in range(1 + shared)}):
        np.testing.assert_array_equal(y, x @ weights)


def test_the_oracle_would_see_an_overflow():
    # Two products of 8 bits, added in 16.
    assert INPUTS.min() * 127 * 2 > 2**15
    assert expected().max() > 2.0 * (9 * 8 * (2**15 - 1) * 2.0**-15)


def test_a_plain_session_is_tried_with_one_product_of_matrices():
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "g",
        [value("a", TensorProto.UINT8, [4, 64]), value("b", TensorProto.INT8, [64, 16])],
        [value("y", TensorProto.INT32, [4, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    assert onnx.load_from_string(bundle_runner.PRODUCT) == model
    assert runtime._PRODUCT == bundle_runner.PRODUCT


def test_a_plain_session_overflows_only_without_vnni():
    assert sums_overflow() == runtime._sums_overflow() == lacks_vnni(environment())


def test_what_cannot_be_tried_counts_as_an_overflow(monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("no such operator in this build")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refused)
    assert sums_overflow.__wrapped__()
    assert runtime._sums_overflow.__wrapped__()


@pytest.mark.parametrize("overflow", [False, True])
def test_sessions_are_slowed_down_only_where_sums_overflow(tmp_path, monkeypatch, overflow):
    """With `session.x64quantprecision` a processor with VNNI takes three times as long."""
    onnx.save(quantized(False), str(tmp_path / "q.onnx"))
    made = []

    class Options(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.entries = {}
            made.append(self.entries)

        def add_session_config_entry(self, key, value):
            self.entries[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(bundle_runner, "sums_overflow", lambda: overflow)
    monkeypatch.setattr("lightning_prune.deploy.runtime.sums_overflow", lambda: overflow)
    monkeypatch.setattr(runtime, "_sums_overflow", lambda: overflow)
    open_session(tmp_path / "q.onnx")
    open_onnxruntime(str(tmp_path / "q.onnx"), {"threads": 1})
    exact_session(str(tmp_path / "q.onnx"), Options())
    _opener(["CPUExecutionProvider"], None)(tmp_path / "q.onnx")
    assert ["session.x64quantprecision" in entries for entries in made] == [overflow] * 4


@pytest.mark.skipif(
    shutil.which("valgrind") is None or platform.machine() != "x86_64",
    reason="needs valgrind on x86-64, which is a processor with AVX2 and without VNNI",
)
def test_an_overflow_is_noticed_and_sums_are_exact_on_a_processor_without_vnni(tmp_path):
    onnx.save(quantized(False), str(tmp_path / "q.onnx"))
    np.savez(tmp_path / "told.npz", x=(INPUTS * 2.0**-8).astype(np.float32), y=expected())
    program = """
import sys
from pathlib import Path
import numpy, onnxruntime
sys.path.insert(0, sys.argv[1])
import bundle_runner
assert bundle_runner.sums_overflow()
told = numpy.load("told.npz")
plain = onnxruntime.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])
assert (plain.run(None, {"x0": told["x"]})[0][0] != told["y"]).any()
exact = bundle_runner.exact_session("q.onnx", onnxruntime.SessionOptions())
assert (exact.run(None, {"x0": told["x"]})[0][0] == told["y"]).all()
print("exact")
"""
    command = ["valgrind", "--tool=none", sys.executable, "-c", program]
    folder = bundle_runner.__file__.rpartition("/")[0]
    done = subprocess.run([*command, folder], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "exact\n", done.stderr


def test_options_of_the_user_stay_as_they_are(tmp_path):
    onnx.save(quantized(False), str(tmp_path / "q.onnx"))
    options = onnxruntime.SessionOptions()
    _opener(["CPUExecutionProvider"], options)(tmp_path / "q.onnx")
    with pytest.raises(RuntimeError, match="x64quantprecision"):
        options.get_session_config_entry("session.x64quantprecision")
