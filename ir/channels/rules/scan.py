"""The rule of the selective scan: channels and states are sliced, time is not."""

from __future__ import annotations

from graphwright.ir.channels.rules.layers import product
from graphwright.ir.channels.values import Result
from graphwright.ir.channels.walk import Call, Walk, rule


@rule("selective_scan")
def _selective_scan(walk: Walk, call: Call) -> Result:
    """A channel whose x or delta is zero stays zero; so does a state whose b or c is.

    Zero in `a` says nothing: a state without decay still grows.
    """
    x, delta, a, b, c = (call[name] for name in ("x", "delta", "a", "b", "c"))
    text = "time steps of a scan"
    x, delta, b, c = (walk.fix(v, 1, text) for v in (x, delta, b, c))
    tokens, states = ["batch", "time", "channel"], ["batch", "time", "state"]
    labels: list[list[object]] = [[*tokens], [*tokens], ["channel", "state"], [*states], [*states]]
    return product(walk, call, [x, delta, a.flags(False), b, c], labels, [*tokens])
