"""OpenVINO as a second engine; its float must be float."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from onnx_files import conv_file

from lightning_prune.deploy import _profile_child, profile
from lightning_prune.deploy.profile import Profile, profile_files
from lightning_prune.errors import MissingDependencyError

JOB = {"engine": "openvino", "threads": 1, "batch": 1, "dims": {}}
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra [openvino] is not installed"
)


@needs_openvino
def test_float_is_computed_in_float32(tmp_path):
    path = str(conv_file(tmp_path / "c.onnx", channels=64, size=32))
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype("f4")}
    run, inputs, compiled = _profile_child.open_openvino(path, JOB)
    expected, _, _session = _profile_child.open_onnxruntime(path, JOB)
    assert inputs == [("x", [None, 3, 32, 32], "tensor(float)")]
    # bfloat16, OpenVINO's default where the processor has it, is off by about 1e-2 here.
    np.testing.assert_allclose(run(feeds)[0], expected(feeds)[0], atol=1e-4)
    assert "float32" in str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@needs_openvino
def test_profile_runs_on_openvino(tmp_path):
    files = {"dense": conv_file(tmp_path / "d.onnx", 32, 16), "pruned": conv_file(tmp_path / "p.onnx", 8, 16)}
    result = profile_files(files, Profile(rounds=50, max_seconds=40, engine="openvino"))
    assert result.protocol["engine"] == "openvino"
    assert result.files["pruned"].latency_ms["speedup"]["value"] > 1
    assert result.files["dense"].peak_memory_bytes > 0
    assert "only ONNX Runtime" in result.files["dense"].missing["operators"]
    assert (
        result.protocol["peak_gmacs"]["reason"] is None or "busy" in result.protocol["peak_gmacs"]["reason"]
    )


def test_missing_openvino_names_the_extra(monkeypatch):
    monkeypatch.setattr(profile, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lightning-prune\[openvino\]'"):
        Profile(engine="openvino")
    assert Profile().engine == "onnxruntime"
