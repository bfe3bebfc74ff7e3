"""What a file says of its weights, against files made by hand."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_prune.deploy.weights import count_weights, least_file_bytes


def matmul_file(path, weight):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [value("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 32), (np.float16, 16)])
def test_the_bound_of_a_file_counts_positions_and_values_at_its_precision(tmp_path, dtype, bits):
    weight = np.zeros((40, 10), dtype)
    weight.flat[:100] = 1.5
    path = matmul_file(tmp_path / "w.onnx", weight)
    expected = (math.log2(math.comb(400, 100)) + 100 * bits) / 8
    assert least_file_bytes(path) == math.ceil(expected)
    assert count_weights(path) == (400, 100)


def test_a_compressor_stays_above_the_bound_on_random_values(tmp_path):
    import gzip

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 100)).astype(np.float32) * (rng.random((300, 100)) < 0.1)
    path = matmul_file(tmp_path / "w.onnx", weight)
    # A float's sign and exponent are predictable; a quarter of its bits at the most.
    assert 0.75 * least_file_bytes(path) < len(gzip.compress(path.read_bytes())) < path.stat().st_size / 4
