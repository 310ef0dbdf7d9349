"""Options of the onnxruntime backend. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graphwright.ir.options import Options, Rule

StepName = Literal[
    "low_rank", "simplify_layout", "find_rms_norm", "find_gelu", "find_silu", "rotary",
    "find_attention", "cached_attention", "attention", "skip_norm", "tidy", "bias_gelu",
    "move_biases", "int8", "table", "blocks",
]  # fmt: skip
"""Names of the rewriting steps (`steps/catalog.py`), here without what they import."""


class OnnxRuntimeOptions(Options):
    """Options of the lowering to ONNX Runtime."""

    rules = (
        Rule("weights", "weights != 'qdq' or opset >= 21",
             "weights: qdq needs opset 21 or later, for blocks in DequantizeLinear; the opset is "
             "{opset}"),
    )  # fmt: skip

    opset: Annotated[int, Field(ge=18, le=23)] = 21
    """Version of the standard ONNX operator set."""

    provider: Literal["cpu", "cuda", "auto"] = "cpu"
    """Device of the artifact; `auto` takes CUDA when there is a usable one."""

    threads: Annotated[int, Field(ge=0)] = 0
    """Threads within an operator; 0 takes torch's current number."""

    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    """Largest relative error against the program, per output; more only where the program itself
    loses digits, by what it loses against float64."""

    external_data_mb: Annotated[float, Field(ge=0, le=2000)] = 1900
    """Weights above this many megabytes go to a file beside the model."""

    weights: Literal["matmulnbits", "qdq"] = "matmulnbits"
    """Form of matrix products with 4 and 8 bit weights in blocks: ONNX Runtime's own op, or the
    standard blocked DequantizeLinear + MatMul (opset 21), which it fuses to the same kernel."""

    accuracy_level: Literal[1, 4] = 4
    """Arithmetic of those products: 4 rounds activations to 8 bits, block by block, as they come
    (fast; adds about 0.5% error to each product), 1 in float32."""

    adapters: Literal["beside", "switchable"] = "beside"
    """Factors of a low-rank adapter: constants of the model, or inputs that have the adapter's
    values for default, so that a run can bring another adapter of any rank (`.onnx_adapter`
    files are written beside the model, one for the base alone too). Such factors are not folded
    or packed ahead: a single adapter runs fastest merged."""

    logits: Literal["last", "all"] = "last"
    """Of a model that generates: the logits behind each row's last token, or behind every one.
    The last ones are all that generating reads; perplexity and checking drafts ask for all."""

    skip: tuple[StepName, ...] = ()
    """Rewriting steps to leave out, by name."""

    sparse_initializers: bool = False
    """Store a weight as its non-zeros and their places where that takes fewer bytes: in float32
    from two thirds of zeros on, for a place takes 8. The runtime makes it dense when it loads the
    model, so this is a matter of the file alone. Weights that lie beside the model stay dense."""
