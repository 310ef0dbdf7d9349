"""The list of graph steps, in the order they run. A further step is one more line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphwright.backends.onnxruntime.options import OnnxRuntimeOptions, StepName
from graphwright.backends.onnxruntime.steps.activations import (
    find_gelu,
    find_silu,
    fuse_bias_gelu,
)
from graphwright.backends.onnxruntime.steps.attention import fuse_attention
from graphwright.backends.onnxruntime.steps.biases import move_biases
from graphwright.backends.onnxruntime.steps.blocks import lower_blocks
from graphwright.backends.onnxruntime.steps.cached_attention import fuse_cached_attention
from graphwright.backends.onnxruntime.steps.eager_attention import find_attention
from graphwright.backends.onnxruntime.steps.int8 import lower_int8
from graphwright.backends.onnxruntime.steps.layout import simplify_layout
from graphwright.backends.onnxruntime.steps.low_rank import split_low_rank
from graphwright.backends.onnxruntime.steps.norms import find_rms_norm, fuse_skip_norm
from graphwright.backends.onnxruntime.steps.rotary import fuse_rotary
from graphwright.backends.onnxruntime.steps.table import lower_table
from graphwright.ir.edit import Editor


@dataclass(frozen=True)
class Step:
    """A named rewrite.

    Attributes:
        name: shown in notes, and what the `skip` option takes.
        run: edits the graph through the editor; returns how often it applied.
        takes_options: `run` takes the backend's options too.
    """

    name: StepName
    run: Callable[..., int]
    takes_options: bool = False

    def __call__(self, editor: Editor, options: OnnxRuntimeOptions) -> int:
        """Edits the graph; returns how often the step applied."""
        return self.run(editor, options) if self.takes_options else self.run(editor)


STEPS: tuple[Step, ...] = (
    Step("low_rank", split_low_rank),
    Step("simplify_layout", simplify_layout),
    Step("find_rms_norm", find_rms_norm),
    Step("find_gelu", find_gelu),
    Step("find_silu", find_silu),
    Step("rotary", fuse_rotary),
    Step("find_attention", find_attention),
    Step("cached_attention", fuse_cached_attention),
    Step("attention", fuse_attention),
    Step("skip_norm", fuse_skip_norm),
    Step("tidy", simplify_layout),
    Step("bias_gelu", fuse_bias_gelu),
    Step("move_biases", move_biases),
    Step("int8", lower_int8),
    Step("table", lower_table),
    Step("blocks", lower_blocks, takes_options=True),
)
