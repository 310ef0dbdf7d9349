"""`graphwright inspect MODEL`: a table of layers, and a drawing of the graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from graphwright.ir.program import Program


def inspect(arguments: Any, console: Console | None = None) -> int:
    """Runs the command.

    Args:
        arguments: `model`, `spec`, `groups`, `svg`, `level`, `allow_pickle`.
        console: where to print; stdout when None.

    Raises:
        GraphwrightError: the model cannot be opened, or the drawing cannot be written.
    """
    from rich.console import Console

    from graphwright.commands.opening import open_program

    program = open_program(
        arguments.model, spec=arguments.spec, allow_pickle=arguments.allow_pickle
    )
    # a file or a pipe has no width of its own: rows stay whole there
    console = console or Console(width=None if sys.stdout.isatty() else 200)
    if arguments.groups:
        print_groups(program, console)
    else:
        print_layers(program, console)
    if arguments.svg is not None:
        from graphwright.ir.view.drawing import draw

        picture = _draw_groups(program) if arguments.groups else draw(program, arguments.level)
        try:
            Path(arguments.svg).write_text(picture, encoding="utf-8")
        except OSError as error:
            raise ArgumentError(f"cannot write --svg {arguments.svg}: {error.strerror}") from error
        console.print(f"drawn into {arguments.svg}", markup=False, highlight=False)
    return 0


def print_layers(program: Program, console: Console) -> None:
    """Signature, layers and totals of a program."""
    from rich.table import Table
    from rich.text import Text

    from graphwright.ir.graph.cost import cost
    from graphwright.ir.view.table import layer_table
    from graphwright.report.charts import count_text, size_text

    for kind, specs in [("input", program.signature.inputs), ("output", program.signature.outputs)]:
        for spec in specs:
            line = f"{kind:<8}{spec.name}: {spec.dtype} ({', '.join(map(str, spec.shape))})"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for dim, sum_of in program.signature.derived.items():
        console.print(f"{'size':<8}{dim} = {sum_of}", markup=False, highlight=False)
    counted = cost(program)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("layer", "kind", "in", "out"):
        table.add_column(title, overflow="fold")
    for title in ("parameters", "bytes", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in layer_table(program, counted):
        figures = (count_text(row.parameters), size_text(row.weight_bytes), count_text(row.macs))
        shown = (text if text not in ("0", "0 B") else "" for text in figures)
        # Text, not markup: a layer's name may hold anything
        table.add_row(*map(Text, (row.name, row.kind, row.inputs, row.output, *shown)))
    console.print()
    console.print(table)
    console.print()
    calls = sum(1 for node in program.graph.nodes if node.op == "call_function")
    at = ", ".join(f"{dim} {size}" for dim, size in counted.sizes.items())
    totals = [
        ("operators", str(calls)),
        ("parameters", f"{counted.parameters:,}"),
        ("weights", size_text(counted.weight_bytes)),
        ("MACs", f"{count_text(counted.macs)}{f' at {at}' if at else ''}"),
    ]
    if at and counted.formula:
        totals.append(("", f"= {counted.formula}"))
    totals += [("note", text) for text in counted.notes]
    for name, text in totals:
        console.print(f"{name:<12}{text}", markup=False, highlight=False, soft_wrap=True)


def print_groups(program: Program, console: Console) -> None:
    """Channel groups of a program: what can be pruned together, and why the rest cannot."""
    from rich.table import Table
    from rich.text import Text

    from graphwright.ir.channels import channel_groups
    from graphwright.ir.view.groups import member_text
    from graphwright.report.charts import count_text, size_text

    groups = channel_groups(program)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("group", overflow="fold")
    for title in ("units", "per unit", "", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("slices of tensor:dimension", overflow="fold")
    table.add_column("kept because of", overflow="fold")
    for group in sorted(groups, key=lambda g: not g.prunable):
        figures = (count_text(round(group.parameters)), size_text(round(group.bytes)),
                   count_text(round(group.macs)))  # fmt: skip
        slices = ", ".join(member_text(group, most=6))
        table.add_row(*map(Text, (group.name, str(group.units), *figures, slices, group.reason)))
    console.print(table)
    free = [group for group in groups if group.prunable]
    line = (
        f"{len(free)} of {len(groups)} groups can be pruned, {sum(g.units for g in free):,} units"
    )
    console.print(f"\n{line}", markup=False, highlight=False, soft_wrap=True)


def _draw_groups(program: Program) -> str:
    """The groups as an SVG document: which feed which."""
    from graphwright.ir.channels import channel_groups
    from graphwright.ir.view.drawing import draw_blocks
    from graphwright.ir.view.groups import group_blocks

    return draw_blocks(group_blocks(channel_groups(program)))
