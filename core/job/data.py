"""The data that a section of the spec names, for a program or a part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.data.batches import Batches
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program
    from graphwright.job.run import Run


def read_data(
    run: Run, section: Any, program: Program, tokenizer: Path | None, parts: Parts | None
) -> Batches:
    """Batches for a program; of a part that others give inputs, made from data of the first part.

    Args:
        run: with the spec, and the name of the part.
        section: `calibration`, `training` or `evaluate`.
        program: that reads the data.
        tokenizer: folder of the model's.
        parts: of the model, as traced; None where it is one program.
    """
    from graphwright.ir.data.batches import example_sizes, load_data

    is_fed = parts is not None and bool(parts.wires(run.part))
    source = next(iter(parts.values())) if parts is not None and is_fed else program
    batches = load_data(
        section.model_dump(exclude_none=True),
        source.signature,
        run.spec.seed,
        root=run.spec.folder,
        sizes=example_sizes(source.signature, source.examples),
        tokenizer=tokenizer,
        initial=source.initial_state(),
    )
    if parts is None or not is_fed:
        return batches
    from graphwright.ir.generation.seq2seq_data import decoder_data

    return decoder_data(parts, batches)
