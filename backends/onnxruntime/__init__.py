"""The ONNX Runtime backend: `lowering.Lowering`, and its result `compiled.OnnxCompiled`."""
