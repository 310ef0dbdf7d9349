"""What the integer kernels of this machine's processor do."""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def saturates() -> bool:
    """Whether products of uint8 and int8 are added in 16 bits: on processors without VNNI."""
    import onnxruntime
    from onnx import TensorProto, helper

    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [4, 64])
    b = helper.make_tensor_value_info("b", TensorProto.INT8, [64, 16])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [4, 16])
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "product", [a, b], [y]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {"a": np.full((4, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    return bool((session.run(None, given)[0] != 255 * 127 * 64).any())
