"""One step of generation as a CUDA graph: a launch in the place of some hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphwright.backends.triton.decoder.buffers import Buffers

WARM = 3
"""Runs before the capture: kernels are compiled and libraries take their workspace in them."""


class CapturedStep:
    """A captured run of one token per row.

    The graph reads its inputs and the buffers at their places; whoever moves a buffer makes a
    new one. Warming up writes the step's own tokens into its own slots, which changes nothing.

    Args:
        body: flat inputs, table and buffers in, logits out.
        given: token ids, positions, lengths and counts of the first step, on the device.
        buffers: what the graph writes to.
    """

    def __init__(
        self, body: Callable[..., tuple[Tensor]], given: list[Tensor], buffers: Buffers
    ) -> None:
        self._given = [tensor.clone() for tensor in given]
        inputs = (*self._given, buffers.table, *buffers.tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                body(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            (self._logits,) = body(*inputs)

    def __call__(self, given: list[Tensor]) -> Tensor:
        """Logits of the step; overwritten by the next one."""
        for place, tensor in zip(self._given, given, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._logits
