"""`graphwright bench ARTIFACT...`: latency of models and artifacts, in alternation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console


def bench(arguments: Any, console: Console | None = None) -> int:
    """Runs the command; the first artifact is what the others are measured against.

    Args:
        arguments: `artifacts`, `spec`, `seconds`, `threads`, `allow_pickle`.
        console: where to print; stdout when None.

    Raises:
        GraphwrightError: one of them cannot be opened, or their inputs differ.
    """
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from graphwright.commands.opening import SEED, open_runnable, probable_sizes
    from graphwright.ir.data.batches import synthetic_inputs
    from graphwright.job.latency import alternate

    if arguments.seconds <= 0:
        raise ArgumentError(f"--seconds {arguments.seconds:g} is no time to measure in")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ArgumentError(f"--threads {arguments.threads} is not a number of threads")
        torch.set_num_threads(arguments.threads)
    opened = {
        name: open_runnable(name, spec=arguments.spec, allow_pickle=arguments.allow_pickle)
        for name in dict.fromkeys(arguments.artifacts)
    }
    first = next(iter(opened.values()))
    generator = torch.Generator().manual_seed(SEED)
    inputs = synthetic_inputs(first.signature, probable_sizes(first), generator)
    _check_inputs(opened, list(inputs))
    with torch.inference_mode():
        timings = alternate(
            {name: _call(model, inputs) for name, model in opened.items()}, arguments.seconds
        )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("artifact", "median", "± half IQR", "speedup"):
        table.add_column(title, justify="left" if title == "artifact" else "right")
    reference = next(iter(timings.values()))
    for name, timing in timings.items():
        table.add_row(
            Text(name), f"{timing.median_ms:.3f} ms", f"{timing.iqr_ms / 2:.3f} ms",
            f"{reference.median_ms / timing.median_ms:.2f}x",
        )  # fmt: skip
    console = console or Console()
    console.print(table)
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    text = f"{shapes}; {torch.get_num_threads()} torch threads, {reference.runs} runs each"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_inputs(opened: dict[str, Any], names: list[str]) -> None:
    for source, model in opened.items():
        own = [spec.name for spec in model.signature.inputs]
        if own != names:
            raise ArgumentError(
                f"{source} takes the inputs {own}, the first one {names}",
                fix="Say with --spec which inputs the models are to be traced with.",
            )


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    return lambda: model(**inputs)
