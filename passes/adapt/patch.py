"""adapt.patch: signatures of robust models, added to the weights of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.adapters.merging import replace_stored
from graphwright.ir.adapters.patch import Patch as Signature
from graphwright.ir.adapters.patch import load_patch, refuse_other_base
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class PatchOptions(Bounded):
    """Options of adapt.patch."""

    patches: Annotated[dict[str, float], Field(min_length=1, examples=[{"fog.safetensors": 1.0}])]
    """Files that `gw.save_patch` wrote, each with the factor of its signature."""

    norms: Literal["robust", "keep"] | None = None
    """Batch norms, which have to fit the weights behind them: `robust` takes the mean of those of
    the robust models, mixed with the model's own where the factors add up to less than 1; `keep`
    leaves them. To be said where the model has some."""


class Patch(Pass[PatchOptions]):
    """Adds signatures of robustness to a model's weights: W + sum of w_c s_c.

    A signature is what training against a corruption moved the weights by, less what training
    alone would have: the difference of a robust model from the common start, without its part along
    the difference of a standard model. `gw.extract_patch` finds it for the first layers, where
    robustness lies, and `gw.save_patch` stores it in few bits. Signatures of several corruptions
    add up, in float64 with one rounding, so that their order is nothing; they go on other models
    with the same start as well. `adapt.unmerge` gives back the bytes from before.

    Source: Cai et al. 2023, "Robust Weight Signatures: Gaining Robustness as Easy as Patching
    Weights?", section 3. The published code multiplies by the factor twice; here it counts once.
    """

    contract = "lossy"
    weights = "reformed"
    papers = ("P67",)
    before = ("cleanup.fold_batch_norm", "cleanup.merge_linear", "quantize.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        has_norms = bool(layers(program, {"batch_norm"}))
        if has_norms and options.norms is None:
            raise ArgumentError(
                f"{self.id}: the model has batch norms, whose statistics go with the weights in "
                "front of them",
                fix="Set `norms: robust` to take those of the robust models, or `norms: keep`.",
            )
        found = {path: load_patch(context.folder / path) for path in options.patches}
        for path, patch in found.items():
            refuse_other_base({**patch.changes, **patch.norms}, program.state,
                              f"the model of patch {path}, next to this one,")  # fmt: skip
        editor = Editor(program, by=self.id)
        actions = [_add(editor, name, found, options.patches)
                   for name in dict.fromkeys(n for p in found.values() for n in p.changes)
                   ]  # fmt: skip
        if has_norms and options.norms == "robust":
            actions += _mix_norms(editor, found, options.patches)
        return Result(editor.finish(), tuple(actions), {"patches": float(len(found))})


def _add(
    editor: Editor, name: str, found: Mapping[str, Signature], factors: Mapping[str, float]
) -> Action:
    old = editor.state[name].detach()
    total = torch.zeros(old.shape, dtype=torch.float64)
    for path in sorted(found):
        if name in found[path].changes:
            total += factors[path] * found[path].changes[name].double()
    size = float(total.norm() / old.double().norm().clamp_min(1e-30))
    replace_stored(editor, name, (old.double() + total).to(old.dtype))
    return Action(name, f"changed by {size:.2e} of its norm")


def _mix_norms(
    editor: Editor, found: Mapping[str, Signature], factors: Mapping[str, float]
) -> list[Action]:
    share = min(1.0, sum(factors.values()))
    actions = []
    for name in dict.fromkeys(n for patch in found.values() for n in patch.norms):
        old = editor.state[name].detach()
        given: list[Tensor] = [p.norms[name].double() for p in found.values() if name in p.norms]
        mean = torch.stack(given).mean(0)
        replace_stored(editor, name, ((1 - share) * old.double() + share * mean).to(old.dtype))
        actions.append(Action(name, f"{share:.0%} of the robust models' mean"))
    return actions
