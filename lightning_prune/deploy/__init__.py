"""From a trained module to a measured file: ONNX, quantization, evaluation, profile."""
