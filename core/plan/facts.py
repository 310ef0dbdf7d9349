"""The sizes of a traced program and its data that an estimate starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphwright.ir.work import DataSize, LayerSize, Load, Work

if TYPE_CHECKING:
    from graphwright.ir.program import Program

LIVE = 4.0
"""Values as large as the largest one that are alive at a time in a run."""


def load_of(
    program: Program,
    calibration: DataSize | None,
    training: DataSize | None,
    check_batches: int,
) -> Load:
    """Sizes of a program and of the data that its passes see.

    Args:
        program: as traced.
        calibration, training: sizes of the data.
        check_batches: calibration batches that every pass is checked on.
    """
    from graphwright.ir.graph.cost import cost, nbytes

    counted = cost(program)
    macs = {layer.node: layer.macs or 0 for layer in counted.layers}
    sizes = [_value_bytes(node) for node in program.graph.nodes if node.op == "call_function"]
    run = Work(
        macs=sum(macs.values()),
        moved=2.0 * sum(sizes) + counted.weight_bytes,
        calls=len(sizes),
        memory=LIVE * max(sizes, default=0),
    )
    return Load(
        layers=_layers(program, macs),
        run=run,
        nodes=len(program.graph.nodes),
        weight_bytes=sum(nbytes(t) for t in program.state.values()),
        checked=_checked(program, calibration, check_batches, others=True),
        measured=_checked(program, calibration, check_batches, others=calibration is None),
        program=program,
        calibration=calibration,
        training=training,
    )


def data_size(program: Program, data: Any) -> DataSize | None:
    """Size of opened data; None where there is none, or where it is no batches of inputs."""
    from graphwright.ir.data.batches import Batches

    if not isinstance(data, Batches):
        return None
    runs = sum(_runs(program, batch) for batch in data)
    return DataSize(data.samples, len(data), runs)


def made_size(program: Program, section: Any) -> DataSize:
    """Size of data that is still to be made of the model, as its section asks for it."""
    from graphwright.ir.synthesis.source import DEFAULT_SAMPLES

    samples = section.samples or DEFAULT_SAMPLES
    first = program.examples[0]
    here = first.shape[0] if first.dim() else 1
    return DataSize(samples, -(-samples // section.batch_size), samples / max(here, 1))


def _runs(program: Program, batch: Any) -> float:
    """Values of a batch's first input, in multiples of the example's."""
    for spec, example in zip(program.signature.inputs, program.examples, strict=True):
        if spec.name in batch and example.numel():
            return float(batch[spec.name].numel() / example.numel())
    return 1.0


def _checked(
    program: Program, calibration: DataSize | None, most: int, *, others: bool
) -> DataSize:
    """Runs of a check: the examples, calibration batches; one sample, and a size far above."""
    from graphwright.ir.data.synthetic import CHEAP, MOST

    runs, calls = 1.0, 1
    if calibration is not None:
        taken = min(calibration.batches, most)
        runs += calibration.runs * taken / max(calibration.batches, 1)
        calls += taken
    if others and program.signature.dims:
        weights = sum(t.numel() for t in program.state.values() if t.is_floating_point())
        elements = sum(t.numel() for t in program.examples)
        dims = len([d for d in program.signature.dims if d not in program.signature.derived])
        widest = 8.0 if dims == 1 else 32.0  # the first of the sizes that `LARGER` tries
        allowed = max(CHEAP / max(weights * elements, 1), MOST)
        runs, calls = runs + min(widest, allowed), calls + 2
    return DataSize(0, calls, runs)


def _layers(program: Program, macs: dict[str, int]) -> tuple[LayerSize, ...]:
    from graphwright.ir.layers.kinds import at_place
    from graphwright.ir.layers.selectors import layers

    found = []
    for layer in layers(program):
        stored: Any = at_place(layer.node, layer.place)
        weight = stored.meta["val"]
        shape = [int(size) for size in weight.shape]
        values = int(weight.numel())
        outer = shape[0] if shape else 1
        inner = values // max(outer, 1)
        rows = macs.get(layer.node.name, 0) / max(values, 1)
        size = values * weight.element_size()
        found.append(LayerSize(layer.name, layer.kind, rows, inner, outer, size))
    return tuple(found)


def _value_bytes(node: Any) -> int:
    """Bytes of the tensors that a call gives, at the example sizes."""
    import torch

    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(_bytes(t) for t in tensors if isinstance(t, torch.Tensor))


def _bytes(tensor: Any) -> int:
    count = 1
    for size in tensor.shape:
        count *= _hint(size)
    return count * int(tensor.element_size())


def _hint(size: Any) -> int:
    node = getattr(size, "node", None)
    if node is None:
        return int(size)
    hint = node.hint if node.has_hint() else None
    return 1 if hint is None else int(hint)
