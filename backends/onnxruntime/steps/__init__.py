"""Named rewrites of the graph into the forms that ONNX Runtime has fast kernels for."""
