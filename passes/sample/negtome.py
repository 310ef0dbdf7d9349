"""sample.negtome: tokens that are pushed away from those of another picture (P30)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.moves import CASTS, COPIES, RESHAPES, TRANSPOSES
from graphwright.ir.graph.nodes import module_paths
from graphwright.ir.graph.sizes import expression_of
from graphwright.ir.layers.heads import FUSED
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import FACT, Denoiser
from graphwright.ir.sampling.tokens import Match, Push, pushed
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.sample._form.base import OTHER_FAMILIES
from graphwright.passes.sample._form.guider import GUIDERS

MOVES = (*RESHAPES, *TRANSPOSES, *COPIES, *CASTS)


class NegtomeOptions(Bounded):
    """Options of sample.negtome."""

    strength: Annotated[float, Field(gt=0)] = 0.9
    """alpha: a token h becomes (1 + alpha) h - alpha r."""

    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.65
    """Cosine of a token and its match from which on it is pushed. The paper takes 0.65 for Flux and
    0.7 for Stable Diffusion XL."""

    stop: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of the steps that push, from the first one on; one step does at least. The paper
    pushes in the first tenth of the noise for Flux, the first fifth for Stable Diffusion XL."""

    modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Modules whose attentions push: patterns over names. The authors' code for Stable Diffusion XL
    takes `up_blocks*`."""

    min_tokens: Annotated[int, Field(ge=1)] = 1
    """Attentions over fewer tokens are left alone; 1024 (32 x 32) for Stable Diffusion XL."""

    skipped_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens in front of the picture's in every attention, which stay: 512 of text for Flux."""

    match: Match = "paper"
    """Whose token a token is pushed from: `paper`, that of the first sample that is most like it;
    `released`, what the authors' code picks."""


class Negtome(Pass[NegtomeOptions]):
    """Pushes samples of a batch away from the first one, so that they come out different.

    Behind every attention over the picture's own tokens, each token looks up the most similar token
    of the batch's first sample, and where the two are alike enough it is moved away from it. The
    first sample finds itself, and stays. Samples with the condition are pushed from the first one
    with it, those without from the first without. A bundle has programs without the push for the
    later steps. A picture of one's own takes the first place when the loop is the caller's: before
    every step row 0 is overwritten with that picture at the step's noise.

    Attentions whose keys do not come from the sample (cross-attention), over windows, or of another
    layout are left alone, and said to be.

    Source: P30, equations 2 and 3. The released code takes the largest cosine over the wrong axis:
    for every token of the first sample the most similar own one, whose position then picks a token
    of the first sample. The paper's text is the default here, `released` gives the code's result.
    Of the released programs, Flux pushes what attention gives before its output layer, which is
    done here, and Stable Diffusion XL behind that layer.
    """

    papers = ("P30",)
    contract: ClassVar[Contract] = "lossy"
    weights: ClassVar[Effect | None] = "kept"
    after: ClassVar[tuple[str, ...]] = (*OTHER_FAMILIES, *GUIDERS)
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = (
        "sample.feynman_kac", "sample.linear_guidance", "sample.negtome", "sample.stream",
    )  # fmt: skip
    computes_in: ClassVar[tuple[str, ...]] = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        """Puts the push behind attentions.

        Raises:
            ModelError: the batch is fixed at one, no module is named so, or no attention is one
                that can push.
        """
        record = Denoiser.required(program, self.id)
        editor = Editor(program, by=self.id)
        (sample,) = editor.graph.find_nodes(op="placeholder", target=record.sample)
        _refuse_alone(sample, self.id)
        options = self.options
        push = Push(options.strength, options.threshold, options.match, options.skipped_tokens)
        reached = _behind(sample)
        actions, done = [], 0
        for node in [n for n in editor.graph.nodes if n.target in FUSED and self._is_asked(n)]:
            found = self._tokens(node, sample, reached)
            if isinstance(found, str):
                actions.append(Action(_place(node), "left alone", found, changed=False))
                continue
            pushed(editor, found, sample, push)
            actions.append(Action(_place(node), f"{found.meta['val'].shape[1]} tokens pushed"))
            done += 1
        if not done:
            raise ModelError(
                f"{self.id}: no attention in {', '.join(options.modules)} can push its tokens",
                details=tuple(f"{action.layer}: {action.reason}" for action in actions),
                fix="It works on attention as one call over [batch, heads, tokens, size], whose "
                "keys come from the sample.",
            )
        record = record.replace(settings={**record.settings, "push": {"stop": options.stop}})
        editor.facts[FACT] = record.to_json()
        return Result(editor.finish(), tuple(actions))

    def _is_asked(self, node: fx.Node) -> bool:
        names = ["", *module_paths(node)]
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.options.modules)

    def _tokens(self, attention: fx.Node, sample: fx.Node, reached: set[fx.Node]) -> fx.Node | str:
        """The attention's result, heads side by side, or why it cannot be pushed."""
        queries, keys = (_node(attention.args[i]) for i in (0, 1))
        if keys not in reached:
            return "its keys do not come from the sample"
        sizes = attention.meta["val"].shape
        count = sizes[-2]
        width = sizes[-1] * (sizes[1] if len(sizes) == 4 else 1)
        if not isinstance(count, int) or queries.meta["val"].shape[-2] != count:
            return "its number of tokens is free"
        if count < self.options.min_tokens:
            return f"it is over {count} tokens, fewer than min_tokens"
        if count <= self.options.skipped_tokens:
            return f"it is over {count} tokens, no more than skipped_tokens"
        node = attention
        while node.meta["val"].dim() != 3:
            readers = list(node.users)
            if len(readers) != 1 or readers[0].target not in MOVES:
                return "its heads are not put side by side"
            node = readers[0]
        found = tuple(node.meta["val"].shape)
        rows = expression_of(found[0]) / expression_of(sample.meta["val"].shape[0])
        if found[1:] != (count, width):
            return "its heads are not put side by side as [batch, tokens, width]"
        return node if rows in (1, 2) else "it is over windows, which are no rows of the batch"


def _refuse_alone(sample: fx.Node, by: str) -> None:
    if sample.meta["val"].shape[0] == 1:
        raise ModelError(
            f"{by}: the batch is fixed at 1, and samples are pushed away from the first one",
            fix="Trace the model with a free batch (`shape: [batch, ...]` in the spec).",
        )


def _behind(start: fx.Node) -> set[fx.Node]:
    """All nodes that depend on one."""
    found: set[fx.Node] = {start}
    for node in start.graph.nodes:
        if any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    assert isinstance(value.meta["val"], torch.Tensor)
    return value


def _place(node: fx.Node) -> str:
    """The innermost module that a call is in."""
    return ([node.name, *module_paths(node)])[-1]
