"""The graph that a session runs: the model behind ONNX Runtime's optimizer, looked into.

The session writes it down as it is made. Run again without any optimization it calls the same
kernels, so that values inside it can be read without changing what is fused: with the same outputs
in the original model the runtime would keep apart what it otherwise joins. A node keeps its name
there, with a suffix, also when the runtime puts a fused one in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from graphwright.backends.onnxruntime.runtime import SessionSettings, feeds_for, open_session
from graphwright.ir.signature import Signature

SUFFIX = re.compile(r"(/duplicated|_token_\d+)+$")
"""Suffix that ONNX Runtime appends to the name of a node that it rewrites."""

INTEGER_KERNELS = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
     "DynamicQuantizeMatMul", "QGemm", "DynamicQuantizeLSTM"}
)  # fmt: skip
"""Kernels that multiply codes by codes."""


class OptimizedGraph:
    """The optimized graph of a session, its nodes found by the names they had before.

    Args:
        path: the model that the session wrote; weights may lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        graph = self.model.graph
        self.nodes = {SUFFIX.sub("", node.name): node for node in reversed(graph.node)}
        self.values = {name for node in graph.node for name in node.output}
        self._last: tuple[tuple[str, ...], onnxruntime.InferenceSession] | None = None

    def kernel(self, node: ir.Node | None) -> str:
        """Op type of what the runtime runs in a node's place; empty when nothing has its name."""
        while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        found = None if node is None else self.nodes.get(str(node.name))
        return "" if found is None else str(found.op_type)

    def value(self, value: ir.Value) -> str | None:
        """Name of what holds `value`, perhaps with its axes in another order; None if nothing.

        A quantizer's codes are often the result of the kernel that it was fused into.
        """
        if value.name in self.values:
            return value.name
        node = value.producer()
        if node is None:
            return None
        place = node.outputs.index(value)
        for _ in range(3):  # the quantizer, the activation before it, the layer before that
            found = self.nodes.get(str(node.name))
            if found is not None:
                return str(found.output[place])
            source = node.inputs[0]
            node = None if source is None else source.producer()
            if node is None or place:
                return None
        return None

    def read(
        self,
        names: Sequence[str],
        settings: SessionSettings,
        signature: Signature,
        inputs: Sequence[torch.Tensor],
    ) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        """Values inside the graph by name, and the outputs, computed by the same kernels."""
        outputs = [value.name for value in self.model.graph.output]
        session = self._session(
            tuple(dict.fromkeys(n for n in names if n not in outputs)), settings
        )
        order = list(dict.fromkeys([*outputs, *names]))
        arrays: list[np.ndarray] = session.run(order, feeds_for(session, signature, inputs))
        found = {n: torch.from_numpy(a) for n, a in zip(order, arrays, strict=True)}
        return found, tuple(found[name] for name in outputs)

    def _session(
        self, further: tuple[str, ...], settings: SessionSettings
    ) -> onnxruntime.InferenceSession:
        """A session that shows further values; the last one is kept."""
        if self._last is None or self._last[0] != further:
            model = onnx.ModelProto()
            model.CopyFrom(self.model)
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in further)
            path = self.path.with_name(f"read.{self.path.name}")
            path.write_bytes(model.SerializeToString())
            self._last = None  # weights are held once
            self._last = (further, open_session(path, settings, optimize=False))
        return self._last[1]
