"""An ONNX file that is called like the module it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.deploy.bundle_runner import exact_session, sums_overflow
from lightning_prune.deploy.interface import Interface
from lightning_prune.errors import EvaluationError, MissingDependencyError

Feed = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


def require_onnxruntime(purpose: str = "EdgeExport") -> Any:
    """Import onnxruntime.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError.of("onnxruntime", purpose, "onnxruntime") from error
    return onnxruntime


def open_session(model: str | Path | bytes, *, threads: int = 0, optimized: str | Path | None = None) -> Any:
    """Open an ONNX file in ONNX Runtime on the CPU.

    Args:
        model: A path, or a serialized model.
        threads: Threads inside one operator; 0 leaves the choice to ONNX Runtime.
        optimized: Where to write the graph with ONNX Runtime's fusions, if anywhere.

    Returns:
        An `onnxruntime.InferenceSession`. Its 8-bit sums are exact on every processor, as on the target.

    Raises:
        EvaluationError: ONNX Runtime does not accept the file.
        MissingDependencyError: onnxruntime is not installed.
    """
    ort = require_onnxruntime("running an ONNX file")
    source = model if isinstance(model, bytes) else str(model)

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings are about graph clean-ups that a user cannot act on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # The last level rearranges weights in memory, under other names, for this machine alone.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # Weights apart, so that it can be written whatever its size.
        for key, value in (("file_name", f"{Path(optimized).name}.data"), ("min_size_in_bytes", "1024")):
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    try:
        if optimized is None and sums_overflow():
            session = exact_session(source, options)
            if options.get_session_config_entry("session.x64quantprecision") == "1":
                return session
            # A static file is exact without it.
            apart = _with_weights_apart(source)
            return session if apart is None else exact_session(apart, options)
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = "the model" if isinstance(model, bytes) else Path(model).name
        raise EvaluationError(f"ONNX Runtime does not accept {what}: {error}") from error


def _with_weights_apart(source: str | bytes) -> bytes | None:
    """Give operators that share an 8-bit weight one each; None if none do, or if it is over 2 GiB."""
    import onnx

    proto = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    weights = {item.name: item for item in proto.graph.initializer if item.data_type == onnx.TensorProto.INT8}
    seen: set[str] = set()
    count = len(proto.graph.initializer)
    for number, node in enumerate(proto.graph.node):
        for place, name in enumerate(node.input):
            if name in seen and node.op_type != "DequantizeLinear":
                twin = onnx.TensorProto()
                twin.CopyFrom(weights[name])
                twin.name = node.input[place] = f"{name}_{number}"
                proto.graph.initializer.append(twin)
            elif name in weights:
                seen.add(name)
    if len(proto.graph.initializer) == count or proto.ByteSize() >= 2**31:
        return None
    serialized: bytes = proto.SerializeToString()
    return serialized


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def to_feed(session: Any, tensors: list[Tensor]) -> Feed:
    """Pair a session's inputs with tensors, in the types the file wants."""
    feed = {}
    for item, tensor in zip(session.get_inputs(), tensors, strict=True):
        array = tensor.detach().cpu()
        # NumPy has no bfloat16.
        array = array.float() if array.dtype is torch.bfloat16 else array
        wanted = _NUMPY.get(item.type)
        feed[item.name] = np.ascontiguousarray(array.numpy(), dtype=wanted)
    return feed


class OnnxModule:
    """Stands in for a module's forward: takes its arguments, returns its outputs, computes with ONNX Runtime.

    Args:
        path: The ONNX file.
        interface: What the module takes and gives.
        threads: Threads inside one operator; 0 leaves the choice to ONNX Runtime.

    Attributes:
        calls: How often it was called.
        record: Whether results are kept in `recorded`.
        recorded: The results of the latest calls; the one who wants them clears them.
    """

    def __init__(self, path: str | Path, interface: Interface, *, threads: int = 0) -> None:
        self.session = open_session(path, threads=threads)
        self.interface = interface
        self.calls = 0
        self.record = False
        self.recorded: list[Any] = []

    def feed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Feed:
        """Return the arrays that the file is run with for a call.

        Raises:
            EvaluationError: The call is not of the structure that was exported.
        """
        tensors = self.interface.tensors(args, kwargs)
        return to_feed(self.session, [tensors[i] for i in self.interface.kept])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file on the arguments of a call of the module."""
        self.calls += 1
        results = [self._run(*call) for call in self.interface.calls(args, kwargs)]
        result = [item for one in results for item in one] if self.interface.single else results[0]
        if self.record:
            self.recorded.append(result)
        return result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = self.interface.tensors(args, kwargs)
        feed = to_feed(self.session, [tensors[i] for i in self.interface.kept])
        arrays = self.session.run(None, feed)
        device = tensors[0].device
        return self.interface.outputs.build([torch.from_numpy(np.array(a)).to(device) for a in arrays])
