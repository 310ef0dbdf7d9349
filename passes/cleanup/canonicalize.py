"""cleanup.canonicalize: one spelling for one thing."""

from __future__ import annotations

from graphwright.ir.canonical.normalize import canonicalize
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class Canonicalize(Pass):
    """Rewrites every op to its canonical form: functional, views as reshapes, one kind of conv.

    Tracing already does this once; run it again behind passes or plugins that insert ops in
    other spellings. Running it twice changes nothing.
    """

    contract = "exact"
    stored_bits = 16

    def run(self, program: Program, context: Context) -> Result:
        before = len(program.graph.nodes)
        after = canonicalize(program)
        removed = before - len(after.graph.nodes)
        return Result(after, (Action("graph", f"{removed} nodes removed"),))
