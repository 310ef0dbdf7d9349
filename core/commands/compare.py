"""`graphwright compare A B`: how far the outputs of two models or artifacts are apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from graphwright.ir.check.fidelity import Fidelity
    from graphwright.ir.data.batches import Batches

DEFAULT_SAMPLES = 16


def compare(arguments: Any, console: Console | None = None) -> int:
    """Runs the command; prints fidelity per output and over all.

    Args:
        arguments: `reference`, `candidate`, `data`, `samples`, `spec`, `allow_pickle`.
        console: where to print; stdout when None.

    Raises:
        GraphwrightError: one of them cannot be opened, or their inputs differ.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from graphwright.commands.opening import SEED, open_runnable, probable_sizes

    opened = [
        open_runnable(source, spec=arguments.spec, allow_pickle=arguments.allow_pickle)
        for source in (arguments.reference, arguments.candidate)
    ]
    _check_inputs(*opened)
    if arguments.samples is not None and arguments.samples < 1:
        raise ArgumentError(f"--samples {arguments.samples}: nothing would be compared")
    data = _load(arguments, opened[0].signature, SEED, probable_sizes(opened[0]))
    parts = compare_over(opened[0], opened[1], data)
    if not parts:
        raise ArgumentError(
            "no output was compared: the data holds no sample, or the models give no tensors",
            where=data.source,
        )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("output", "max |a-b|", "relative", "cosine", "SNR"):
        table.add_column(title, justify="left" if title == "output" else "right")
    for name, error in parts.items():
        table.add_row(Text(name), *_figures(error))
    console = console or Console()
    console.print(table)
    for note in dict.fromkeys(note for error in parts.values() for note in error.notes):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    where = f"{data.samples} samples of {data.source} data, seed {SEED}"
    console.print(where if data.source == "synthetic" else f"{data.samples} samples, {data.source}",
                  markup=False, highlight=False, soft_wrap=True)  # fmt: skip
    return 0


def compare_over(reference: Any, candidate: Any, data: Batches) -> dict[str, Fidelity]:
    """Fidelity of every output, and of all together under `all`, over all batches.

    Args:
        reference: called with inputs by name.
        candidate: the same.
        data: the inputs.
    """
    import torch

    from graphwright.ir.check.fidelity import Fidelity, leaves, merge
    from graphwright.ir.check.fidelity import compare as measure

    totals: dict[str, Fidelity] = {"all": Fidelity()}
    with torch.inference_mode():
        for batch in data:
            a, b = reference(**batch), candidate(**batch)
            totals["all"] = merge([totals["all"], measure(a, b)])
            left, right = dict(leaves(a)), dict(leaves(b))
            for path in left:
                if path in right:
                    part = measure(left[path], right[path])
                    totals[path] = merge([totals.get(path, Fidelity()), part])
    overall = totals.pop("all")
    if not totals and not overall.broken:
        return {}
    return overall_last(totals, overall)


def overall_last(outputs: dict[str, Fidelity], overall: Fidelity) -> dict[str, Fidelity]:
    """Outputs by name, then `all`, unless there is only one."""
    if len(outputs) == 1 and not overall.broken:
        return {name or "output": overall for name in outputs}
    return {**outputs, "all": overall}


def _figures(error: Fidelity) -> list[str]:
    from graphwright.report.charts import figure_text

    if error.broken or error.blank:
        return ["broken" if error.broken else "nothing", "", "", ""]
    snr = f"{error.snr_db:.1f} dB" if error.max_abs else "exact"
    return [f"{error.max_abs:.3g}", f"{error.relative:.3g}", figure_text(error.cosine), snr]


def _check_inputs(reference: Any, candidate: Any) -> None:
    names = [[spec.name for spec in model.signature.inputs] for model in (reference, candidate)]
    if names[0] != names[1]:
        raise ArgumentError(
            f"the two take different inputs: {names[0]} and {names[1]}",
            fix="Say with --spec which inputs the model is to be traced with.",
        )


def _load(arguments: Any, signature: Any, seed: int, sizes: dict[str, int]) -> Batches:
    from graphwright.ir.data.batches import load_data

    section: dict[str, Any] = {"data": arguments.data or "synthetic"}
    if arguments.samples is not None:
        section["samples"] = arguments.samples
    elif arguments.data is None:
        section["samples"] = DEFAULT_SAMPLES
    return load_data(section, signature, seed, root=Path(), sizes=sizes)
