"""From what a model file held to a Program, with the inputs that the spec declares."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from graphwright.ir.errors import ModelError
from graphwright.job.declared import check_declared

if TYPE_CHECKING:
    from graphwright.ir.files import LoadedModel
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program
    from graphwright.specs.sections import InputSection, ModelSection

DEFAULT_SIZES = {0: 2}
"""Example size of a dynamic axis that the spec gives no `example` for; others get 8."""


def build_program(loaded: LoadedModel, section: ModelSection, seed: int) -> Program:
    """Traces the loaded model, or takes the program the file already holds.

    Args:
        loaded: what `load_model` returned.
        section: the spec's `model` section.
        seed: of the example inputs.

    Raises:
        ModelError: it cannot be traced, needs inputs that the spec does not declare, or has other
            inputs than it declares.
    """
    program = loaded.program
    if program is not None:
        check_declared(program, section, str(loaded.source))
    else:
        program = _with_cache(loaded, section, seed) or _traced(
            loaded, section.inputs or _own_inputs(loaded), seed, section.state
        )
    if loaded.is_fixed and loaded.change.dtype is not None:
        from graphwright.passes.cast.dtype import in_float32

        program = in_float32(program)
    return program


def build_traced(loaded: LoadedModel, section: ModelSection, seed: int) -> Program | Parts:
    """The program of a model, or the programs of one that is several."""
    parts = build_parts(loaded, section, seed)
    return build_program(loaded, section, seed) if parts is None else parts


def build_parts(loaded: LoadedModel, section: ModelSection, seed: int) -> Parts | None:
    """The programs of a model that is several; None for one that is one program.

    An encoder-decoder of transformers is an encoder and a decoder, unless its inputs are declared
    or `task: logits` asks for it as a whole.

    Raises:
        ModelError: it cannot be traced in parts.
    """
    from graphwright.ir.generation.decoder import NoCache
    from graphwright.ir.generation.seq2seq_trace import is_encoder_decoder, trace_encoder_decoder

    declared = bool(section.inputs) or section.state == "explicit"
    asked = section.task == "generation"
    if section.task == "logits" or declared or not is_encoder_decoder(loaded.module):
        return None
    try:
        return trace_encoder_decoder(loaded.module, folder=loaded.tokenizer, seed=seed)
    except NoCache as reason:
        raise ModelError(
            f"the model cannot be traced as an encoder and a decoder: {reason}",
            where="model.task" if asked else str(loaded.source),
            fix="Declare its inputs in the spec, to compile it as one program without a cache.",
        ) from reason


def _with_cache(loaded: LoadedModel, section: ModelSection, seed: int) -> Program | None:
    """A causal language model with its cache; None where the task is another one.

    Raises:
        ModelError: `task: generation` is asked of a model that keeps no cache, or beside `inputs`.
    """
    from graphwright.ir.generation.decoder import NoCache
    from graphwright.ir.generation.trace import is_decoder, trace_decoder
    from graphwright.ir.trace.capture import TraceWarning

    asked = section.task == "generation"
    declared = bool(section.inputs) or section.state == "explicit"
    if asked and declared:
        raise ModelError(
            "the inputs of a decoder with a cache follow from the model",
            where="model.inputs" if section.inputs else "model.state",
            fix="Leave that out, or choose `task: logits`.",
        )
    if section.task == "logits" or declared or not (asked or is_decoder(loaded.module)):
        return None
    if loaded.module is None or not is_decoder(loaded.module):
        raise ModelError(
            "the model is no causal language model of transformers",
            where="model.task",
            fix="Leave `task: generation` out.",
        )
    try:
        return trace_decoder(loaded.module, folder=loaded.tokenizer, seed=seed)
    except NoCache as reason:
        if asked:
            raise ModelError(
                f"the model cannot be traced with a cache: {reason}",
                where="model.task",
                fix="Choose `task: logits`.",
            ) from reason
        said = f"traced as plain logits, without a cache: {reason}"
        warnings.warn(said, TraceWarning, stacklevel=2)
        return None


def _traced(
    loaded: LoadedModel,
    inputs: Mapping[str, InputSection],
    seed: int,
    state: Literal["frozen", "explicit"],
) -> Program:
    from graphwright.ir.trace.capture import trace
    from graphwright.job.pinned import pinned_arguments

    if loaded.module is None:
        raise ModelError(f"{loaded.source} holds no model that can be traced")
    pinned = pinned_arguments(loaded.module, inputs)
    if not loaded.is_fixed:
        inputs = {name: _following(spec, loaded.change.replaced) for name, spec in inputs.items()}
    free = {name: spec for name, spec in inputs.items() if name not in pinned}
    dynamic = {
        name: {axis: dim for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)}
        for name, spec in free.items()
    }
    ranges = {name: spec.range for name, spec in free.items() if spec.range is not None}
    examples = example_inputs(free, seed)
    arguments = {name: pinned[name] if name in pinned else examples[name] for name in inputs}
    return trace(loaded.module, arguments, dynamic=dynamic, ranges=ranges, state=state)


def original_runner(loaded: LoadedModel, program: Program, section: ModelSection) -> Any:
    """The loaded module as a function of the program's inputs, in signature order."""
    from graphwright.ir.generation.record import Generation
    from graphwright.job.pinned import as_arguments, pinned_arguments

    assert loaded.module is not None
    record = Generation.of(program)
    if record is not None and record.kind != "decoder":
        from graphwright.ir.generation.seq2seq_trace import original_half

        return original_half(loaded.module, program)
    if record is not None:
        from graphwright.ir.generation.trace import original_call

        return original_call(loaded.module, program)
    pinned = as_arguments(pinned_arguments(loaded.module, section.inputs))
    return loaded.runner(program.signature, pinned)


def _following(spec: InputSection, replaced: Mapping[str, str]) -> InputSection:
    """An input declared in the dtype that the weights were stored in follows them."""
    return spec.model_copy(update={"dtype": replaced.get(str(spec.dtype), spec.dtype)})


def _own_inputs(loaded: LoadedModel) -> dict[str, InputSection]:
    """A model file that carries example inputs (or whose kind tells them) needs no section."""
    from graphwright.ir.generation.seq2seq_trace import is_encoder_decoder

    if loaded.inputs is None and is_encoder_decoder(loaded.module):
        raise ModelError(
            "the model is an encoder and a decoder, two programs that `optimize` compiles together",
            where=str(loaded.source),
            fix="Declare its inputs in a spec, to look at it as one program without a cache.",
        )
    if loaded.inputs is None:
        raise ModelError(
            "the file does not say what inputs the model takes",
            where=str(loaded.source),
            fix="Declare them in the spec: model: {inputs: {x: {dtype: float32, shape: "
            "[batch, 3, 32, 32]}}}.",
        )
    return {name: _as_section(spec) for name, spec in loaded.inputs.items()}


def _as_section(spec: Any) -> InputSection:
    from graphwright.specs.sections import InputSection

    return spec if isinstance(spec, InputSection) else InputSection(**spec)


def example_inputs(inputs: Mapping[str, InputSection], seed: int) -> dict[str, Any]:
    """Seeded example tensors: within `range`, of the `example` sizes, masks right-padded."""
    import torch

    from graphwright.ir.data.batches import synthetic_inputs
    from graphwright.ir.signature import Signature, TensorSpec

    sizes = example_sizes(inputs)
    specs = tuple(
        TensorSpec(name, str(spec.dtype), spec.shape or (), spec.range)
        for name, spec in inputs.items()
    )
    generator = torch.Generator().manual_seed(seed)
    return dict(synthetic_inputs(Signature(specs, (), None), sizes, generator))


def example_sizes(inputs: Mapping[str, InputSection]) -> dict[str, int]:
    """Size of every dynamic dimension in the example inputs.

    Raises:
        ModelError: two inputs give one dimension two sizes, or a dynamic one the size 1.
    """
    sizes: dict[str, int] = {}
    for name, spec in inputs.items():
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, str):
                continue
            if spec.example is None:
                sizes.setdefault(dim, DEFAULT_SIZES.get(axis, 8))
                continue
            size = spec.example[axis]
            if size < 2:
                raise ModelError(
                    f"dimension {dim!r} has the example size {size}, which tracing would fix",
                    where=f"model.inputs.{name}",
                    fix="Give an example size of 2 or more.",
                )
            if sizes.setdefault(dim, size) != size:
                raise ModelError(
                    f"dimension {dim!r} has the example sizes {sizes[dim]} and {size}",
                    where=f"model.inputs.{name}",
                )
    return sizes
