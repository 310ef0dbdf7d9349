"""Faults put into right programs: small, partial, or only seen at other sizes and values."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from trust.nets import NETS

import graphwright as gw
from graphwright.ir.edit import Editor

aten = torch.ops.aten
BY = "test.fault"


@dataclass(frozen=True)
class Fault:
    """A wrong program beside the right one.

    Attributes:
        kind: what is wrong with it. net: where. what: the place, in words.
        program: the right program.
        inject: the same with the fault; given any program with the net's nodes and tensors.
    """

    kind: str
    net: str
    what: str
    program: gw.Program
    inject: Callable[[gw.Program], gw.Program]


def draw_faults(seed: int) -> Iterator[Fault]:
    """Faults without end, of all kinds in turn; each changes what the program computes."""
    draw = random.Random(seed)
    made = 0
    while True:
        kind = list(KINDS)[made % len(KINDS)]
        nets = ["TwoHeads"] if kind == "one output of several" else list(NETS)
        if kind == "beyond 4 sigma":
            nets = [name for name, net in NETS.items() if not net.vocabulary]
        net = draw.choice(nets)
        program = NETS[net].program(draw.randrange(10**6))
        what, inject = KINDS[kind](program, draw)
        if _is_real(program, inject(program), net):
            made += 1
            yield Fault(kind, net, what, program, inject)


def _is_real(program: gw.Program, wrong: gw.Program, net: str) -> bool:
    """Whether any of many inputs shows it: most of its place may be dead or cut off."""
    generator = torch.Generator().manual_seed(0)
    (spec,) = program.signature.inputs
    for samples in (1, 3, 40):
        x = NETS[net].draw(samples, generator)
        for factor in (1,) if spec.dtype == "int64" else (1, 10):
            try:
                pairs = zip(
                    program.run_flat((factor * x,)), wrong.run_flat((factor * x,)), strict=True
                )
            except RuntimeError:
                return True
            if any(gw.compare(a, b).relative > 1e-6 for a, b in pairs):
                return True
    return False


Change = tuple[str, Callable[[gw.Program], gw.Program]]


def _weight(program: gw.Program, draw: random.Random) -> str:
    names = [n for n, t in program.state.items() if t.dim() >= 1 and t.is_floating_point()]
    return draw.choice(names)


def _scaled(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def inject(program: gw.Program) -> gw.Program:
        editor = Editor(program, by=BY)
        editor.set_state(name, change(program.state[name].detach().clone()))
        return editor.finish()

    return inject


def one_channel(program: gw.Program, draw: random.Random) -> Change:
    """A row of a weight is off by 1% to 100%."""
    name = _weight(program, draw)
    row, by = draw.randrange(program.state[name].shape[0]), draw.choice([0.0, 0.5, 0.99, 1.3])

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row] *= by
        return tensor

    return f"row {row} of {name} times {by}", _scaled(name, change)


def one_scale(program: gw.Program, draw: random.Random) -> Change:
    """A whole tensor is off by a thousandth."""
    name = _weight(program, draw)
    return f"{name} times 1.001", _scaled(name, lambda tensor: tensor * 1.001)


def one_output(program: gw.Program, draw: random.Random) -> Change:
    """One output of several is off by a thousandth, or a column of it is zero."""
    place, is_zero = draw.randrange(len(program.signature.outputs)), draw.random() < 0.5
    width = program.signature.outputs[place].shape[-1]
    assert isinstance(width, int)
    keep = torch.ones(width)
    keep[draw.randrange(width)] = 0

    def inject(program: gw.Program) -> gw.Program:
        editor = Editor(program, by=BY)
        output = editor.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        factor: Any = 1.001
        if is_zero:
            with editor.graph.inserting_before(output):
                factor = editor.get(editor.add_state("kept", keep))
        results[place] = editor.call(aten.mul.Tensor, results[place], factor, before=output)
        output.args = (tuple(results),)
        return editor.finish()

    return f"output {place} {'without a column' if is_zero else 'times 1.001'}", inject


def _somewhere(program: gw.Program, draw: random.Random) -> str:
    found = [
        node.name for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].is_floating_point() and node.meta["val"].dim() > 1
        and any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape[:1])
    ]  # fmt: skip
    return draw.choice(found)


def _behind(program: gw.Program, name: str, make: Callable[[Editor, fx.Node, fx.Node], Any]) -> Any:
    """Readers of a node read what `make` makes of it."""
    editor = Editor(program, by=BY)
    (node,) = [n for n in editor.graph.nodes if n.name == name]
    readers = list(node.users)
    new = make(editor, node, readers[0])
    for reader in readers:
        reader.replace_input_with(node, new)
    return editor.finish()


def other_sizes(program: gw.Program, draw: random.Random) -> Change:
    """Right at the example's number of samples, and off by 1% at a single one, at far more, or at
    any other."""
    name, when = _somewhere(program, draw), draw.choice(["one", "far more", "any other"])
    here = program.examples[0].shape[0]

    def make(editor: Editor, node: fx.Node, reader: fx.Node) -> fx.Node:
        def call(target: Any, *args: Any) -> fx.Node:
            return editor.call(target, *args, before=reader)

        (x,) = editor.graph.find_nodes(op="placeholder")
        size = call(aten.sym_size.int, x, 0)
        if when == "one":
            off: Any = call(operator.floordiv, 1, size)
        elif when == "far more":
            off = call(operator.floordiv, size, 3 * here)
        else:
            off = call(operator.sub, size, here)
        factor = call(operator.add, 1.0, call(operator.mul, off, 0.01))
        return call(aten.mul.Tensor, node, factor)

    return f"{name} at {when}", lambda p: _behind(p, name, make)


def beyond(program: gw.Program, draw: random.Random) -> Change:
    """A value is cut off at four standard deviations of what the examples give."""
    name = draw.choice(["x", _somewhere(program, draw)])
    values: dict[str, torch.Tensor] = {}

    class Reads(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Reads(program.module).run(*program.examples)
    value = values[name]
    middle, limit = float(value.mean()), 4 * float(value.std())
    low, high = middle - limit, middle + limit
    return f"{name} cut off at 4 sigma", lambda p: _behind(
        p, name, lambda e, node, at: e.call(aten.clamp.default, node, low, high, before=at)
    )


KINDS: dict[str, Callable[[gw.Program, random.Random], Change]] = {
    "one channel": one_channel,
    "one scale by 1e-3": one_scale,
    "one output of several": one_output,
    "other sizes": other_sizes,
    "beyond 4 sigma": beyond,
}
