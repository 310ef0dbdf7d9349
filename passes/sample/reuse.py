"""sample.reuse: steps that take over what an earlier step computed (P21, and the deep cache)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from pydantic import Field
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.cost import cost
from graphwright.ir.graph.nodes import module_paths
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.cached import mark, shallow
from graphwright.ir.sampling.record import FACT, Denoiser, refuse_stream
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.sample._form.base import OTHER_FAMILIES

MOST_NAMED = 20
"""Modules that a message names."""


class ReuseOptions(Options):
    """Options of sample.reuse."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("refresh", "refresh is None or 0 in refresh",
             "refresh has to hold step 0: there is nothing yet to take over"),
    )  # fmt: skip

    modules: Annotated[tuple[str, ...], Field(min_length=1, examples=[["mid_block"]])]
    """Modules whose results are taken over: patterns over their names, of blocks, layers or parts
    of layers. All that leaves them is kept; what only they needed is not computed."""

    interval: Annotated[int, Field(ge=1)] = 3
    """Every so many steps everything is computed."""

    refresh: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Steps at which everything is computed, in the place of an interval."""


class Reuse(Pass[ReuseOptions]):
    """Lets most steps take over the results of some modules from an earlier step.

    The program stays as it is; its values at the edge of the modules are marked, and a bundle has
    a `full` program that hands them out and a `full_shallow` one that takes them in, cut out of the
    same graph. The deep-feature cache of U-Nets is `modules` that name all of the deep levels. At
    steps without guidance the rows with the condition are taken over.

    Samples change: how far is seen by sampling with `interval: 1`, which is exact.

    Source: P21, the inheritance of features by block, layer and unit; Ma et al. 2024 (DeepCache).
    """

    papers = ("P21",)
    contract: ClassVar[Contract] = "exact"
    weights: ClassVar[Effect | None] = "kept"
    tolerance: ClassVar[float] = 0.0
    after: ClassVar[tuple[str, ...]] = OTHER_FAMILIES
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = ("sample.reuse",)

    def run(self, program: Program, context: Context) -> Result:
        """Marks the values.

        Raises:
            ModelError: no such module, nothing leaves them, or a cut there saves nothing.
        """
        record = Denoiser.required(program, self.id)
        refuse_stream(record, self.id)
        editor = Editor(program, by=self.id)
        inside = {node for node in editor.graph.nodes if self._is_inside(node)}
        if not inside:
            names = sorted({path for node in editor.graph.nodes for path in module_paths(node)})
            raise ModelError(
                f"{self.id}: no module is named {' or '.join(self.options.modules)}",
                fix=f"There are {', '.join(names[:MOST_NAMED])}.",
            )
        edge = [node for node in editor.graph.nodes if node in inside and _leaves(node, inside)]
        kept = tuple(f"cached_{number}" for number in range(len(edge)))
        for node, name in zip(edge, kept, strict=True):
            mark(node, name)
        settings = {
            **record.settings,
            "interval": self.options.interval,
            "refresh": None if self.options.refresh is None else list(self.options.refresh),
        }
        record = record.replace(cached=kept, settings=settings)
        editor.facts[FACT] = record.to_json()
        editor.changed = True
        made = editor.finish()
        left = _work(shallow(made, record)) / max(_work(made), 1)
        if left >= 1:
            raise ModelError(
                f"{self.id}: a step that takes over the results of these modules would compute as "
                "much as before",
                fix="Name modules whose inputs nothing else needs.",
            )
        said = [Action(n.name, f"kept as {name}") for n, name in zip(edge, kept, strict=True)]
        return Result(made, tuple(said), {"share of a shallow step": left})

    def _is_inside(self, node: fx.Node) -> bool:
        return node.op == "call_function" and any(
            fnmatchcase(path, pattern)
            for path in module_paths(node)
            for pattern in self.options.modules
        )


def _work(program: Program) -> int:
    """Multiplications of a call, or calls of operators where those are not known."""
    calls = sum(node.op == "call_function" for node in program.graph.nodes)
    return cost(program).macs or calls


def _leaves(node: fx.Node, inside: set[fx.Node]) -> bool:
    import torch

    is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
    return is_tensor and any(user not in inside for user in node.users)
