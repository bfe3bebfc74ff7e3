"""Models over protobuf's limit lie in two files; the limit is lowered here."""

from __future__ import annotations

import errno
import gzip
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from processes import run_python

from lightning_prune.deploy import storage
from lightning_prune.deploy.onnx_cost import count_file_macs
from lightning_prune.deploy.storage import data_files, load_graph, parts_of, sizes_of, write_model
from lightning_prune.deploy.weights import count_weights, least_file_bytes
from lightning_prune.errors import OutputError


def model(seed=0):
    """A linear layer of 64 x 48 with a bias, and the shape of a reshape."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((64, 48)).astype("f4")
    weight[0] = 0
    initializers = [
        numpy_helper.from_array(weight, "fc.weight"),
        numpy_helper.from_array(generator.standard_normal(48).astype("f4"), "fc.bias"),
        numpy_helper.from_array(generator.standard_normal((48, 32)).astype("f4"), "out.weight"),
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["h"]),
        helper.make_node("MatMul", ["h", "out.weight"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.linspace(-1, 1, 128, dtype="f4").reshape(2, 64)})[0]


@pytest.fixture
def lowered(monkeypatch):
    monkeypatch.setattr(storage, "LIMIT", 4096)


def test_under_the_limit_there_is_one_file(tmp_path):
    path = write_model(tmp_path / "net.onnx", model())
    assert parts_of(path) == [path]
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_over_the_limit_the_weights_lie_in_a_second_file_that_runtimes_find(tmp_path, lowered):
    onnx.save(model(), tmp_path / "plain.onnx")
    path = write_model(tmp_path / "net.onnx", model())
    (weights,) = data_files(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([weights.name, "net.onnx", "plain.onnx"])
    assert weights.name.startswith("net.")
    assert weights.suffix == ".data"
    onnx.checker.check_model(str(path))
    assert np.array_equal(run(path), run(tmp_path / "plain.onnx"))
    entries = [item for item in load_graph(path).graph.initializer if item.external_data]
    assert [item.name for item in entries] == ["fc.weight", "out.weight"], "the small bias stays in the model"
    for item in entries:
        assert int(onnx.external_data_helper.ExternalDataInfo(item).offset) % 4096 == 0


def test_both_files_are_measured_as_one_model(tmp_path, lowered):
    onnx.save(model(), tmp_path / "plain.onnx")
    path = write_model(tmp_path / "net.onnx", model())
    assert count_weights(path) == count_weights(tmp_path / "plain.onnx") == (64 * 48 + 48 + 48 * 32, 4608)
    assert least_file_bytes(path) == least_file_bytes(tmp_path / "plain.onnx")
    assert count_file_macs(path).macs == 64 * 48 + 48 * 32
    size, compressed = sizes_of(path)
    assert size == sum(p.stat().st_size for p in parts_of(path))
    assert len(gzip.compress(data_files(path)[0].read_bytes(), mtime=0)) < compressed < size


def test_the_weights_file_is_named_after_its_content(tmp_path, lowered):
    path = write_model(tmp_path / "net.onnx", model())
    (weights,), text, before = data_files(path), path.read_bytes(), run(path)
    assert write_model(path, model()).read_bytes() == text
    assert data_files(path) == [weights]
    # Killed after the new weights and before the new model, the old model still has its own.
    write_model(tmp_path / "net.onnx", model(1))
    assert data_files(path) != [weights]
    path.write_bytes(text)
    assert np.array_equal(run(path), before)


def test_a_full_disk_leaves_neither_file(tmp_path):
    code = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_storage import model
        from lightning_prune.deploy import storage
        from lightning_prune.errors import OutputError
        storage.LIMIT = 4096
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            storage.write_model({str(tmp_path / "net.onnx")!r}, model())
        except OutputError as error:
            print(error.errno)
    """
    done = run_python("-c", textwrap.dedent(code))
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError):
        write_model(tmp_path / "missing" / "net.onnx", model())
