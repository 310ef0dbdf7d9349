"""The data that a section of the spec names, for a program or a part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.data.batches import Batches
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program
    from graphwright.job.run import Run
    from graphwright.specs.spec import Spec


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
    if getattr(section, "source", None) is not None:
        return _made(run, section, program)
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


def all_data(
    run: Run, program: Program, tokenizer: Path | None, parts: Parts | None
) -> dict[str, Any]:
    """The data of the sections `evaluate`, `calibration` and `training`, None where absent."""
    section = run.spec.evaluate
    with run.stage("data"):
        held_out: Any = None
        if section is not None and section.metric == "multiple_choice":
            from graphwright.ir.data.questions import load_questions

            given = section.model_dump(exclude_none=True)
            held_out = load_questions(given, root=run.spec.folder, tokenizer=tokenizer)
        elif section is not None:
            held_out = read_data(run, section, program, tokenizer, parts)
        seen = seen_data(run, program, tokenizer, parts)
    return {"evaluate": held_out, "calibration": seen[0], "training": seen[1]}


def seen_data(
    run: Run, program: Program, tokenizer: Path | None, parts: Parts | None
) -> list[Batches | None]:
    """The data of `calibration` and of `training`, None for a section that is not there.

    What has to be made comes last: it takes long, and the rest may be wrong.

    Raises:
        ModelError, ArgumentError: the model lacks what a `source` takes, or data cannot be read.
    """
    sections = [run.spec.calibration, run.spec.training]
    check_made(run.spec, program, several=parts is not None)
    found: list[Batches | None] = [None, None]
    for index in sorted((0, 1), key=lambda i: getattr(sections[i], "source", None) is not None):
        section = sections[index]
        if section is not None:
            found[index] = read_data(run, section, program, tokenizer, parts)
    return found


def write_made(section: dict[str, Any], batches: Batches | None, folder: Path, name: str) -> None:
    """Writes data that was made to `folder/name.safetensors`, and lets the section name the file.

    Args:
        section: as plain data; changed.
        batches: what was made.
        folder: of the spec that the section goes into.
        name: of the section.
    """
    if section.pop("source", None) is None or batches is None:
        return
    import torch
    from safetensors.torch import save_file

    read = list(batches.labelled())
    tensors = {key: torch.cat([inputs[key] for inputs, _ in read]) for key in read[0][0]}
    labels = [found for _, found in read if found is not None]
    if labels:
        tensors["labels"] = torch.cat(labels)
    save_file(tensors, str(folder / f"{name}.safetensors"))
    for option in ("synthesis", "shift", "filter", "threshold", "keep", "samples"):
        section.pop(option, None)
    section["data"] = f"{name}.safetensors"


def check_made(spec: Spec, program: Program, *, several: bool) -> None:
    """What the model lacks for the data that the spec lets be made of it."""
    from graphwright.ir.errors import ArgumentError
    from graphwright.ir.synthesis.source import check_source

    for name in ("calibration", "training"):
        section = getattr(spec, name)
        if section is None or section.source is None:
            continue
        if several:
            raise ArgumentError(
                f"source: {section.source} is for a model of one program, and this is several",
                where=name,
                fix="Give data.",
            )
        check_source(section.model_dump(exclude_none=True), program)


def _made(run: Run, section: Any, program: Program) -> Batches:
    """Data that is made of the model; kept in the work folder, and so made once in a run."""
    import torch

    from graphwright.ir.context import Context
    from graphwright.ir.synthesis.source import make_data
    from graphwright.job.checkpoint import chain_key
    from graphwright.job.environment import environment, own_code

    if not run.settings.resume and not run.made:
        run.place.drop_data_work()
    context = Context(
        seed=run.spec.seed,
        device=torch.device(run.settings.device),
        work=run.place.data_work,
        progress=run.progress.update,
        warn=run.warn,
        key=chain_key("", environment=environment(), code=own_code()),
        checkpoint_seconds=run.settings.checkpoint_seconds,
    )
    with run.progress.stage(section.source):
        batches = make_data(
            section.model_dump(exclude_none=True), program, context, run.spec.folder
        )
    run.made = True
    return batches
