"""Lowering to ONNX Runtime: `lowering.Lowering` is the backend, `compiled.OnnxCompiled` its result."""
