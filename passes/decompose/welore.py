"""decompose.welore: ranks by one threshold on all normalized spectra; what is low-rank is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import Stored
from graphwright.ir.layers.factors import split
from graphwright.ir.layers.kinds import MATRICES, TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Action, Context, Pass, Result, WeightKind
from graphwright.passes.decompose._form.eligible import eligible
from graphwright.passes.decompose._form.pair import insert_pair
from graphwright.passes.decompose._form.ranks import DecomposeOptions, names
from graphwright.passes.decompose._form.report import MASKS

HALF = 0.4999
"""Share of its rank above which the paper's code counts a matrix as low-rank."""

ROUNDS = 60
"""Halvings of the threshold's interval."""


class WeloreOptions(DecomposeOptions):
    """Options of decompose.welore."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the ranks of all layers together that goes. Less goes in fact: a matrix that is not
    low-rank keeps all of its own."""

    rule: Literal["half", "break_even"] = "half"
    """Matrices that count as low-rank: those that lose half of their rank or more, as in the paper;
    or those whose two factors are smaller than they are, which is more of the wide ones."""

    freeze: bool = True
    """Whether everything but the factors stops being trained, so that `tune.finetune` behind this
    pass tunes them alone."""


class Welore(Pass[WeloreOptions]):
    """Finds the matrices of a transformer that are low-rank, and puts two factors in their place.

    The singular values of every matrix are brought to 0 to 1 (s - min) / (max - min), and one
    threshold cuts all of them: it is found by bisection so that the share `ratio` of all ranks lies
    below. Matrices with heavy tails lose much, flat ones next to nothing. Those that lose half of
    their rank become two factors (U sqrt(S)) (sqrt(S) V^T), which are what is tuned later; the
    others stay whole and frozen. Looks at no data.

    The paper's text speaks of normalized singular values; its code brings them to 0 to 1 by
    smallest and largest, and so does this. That code drops the bias of a factored layer; here it
    stays. A matrix whose singular values are all equal has no tail, and stays.

    Source: Jaiswal et al. 2024, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge
    from Low-Rank Gradients", section 3.
    """

    contract = "lossy"
    papers = ("P82",)
    takes: ClassVar[tuple[WeightKind, ...]] = ("linear",)
    before = ("quantize.*", *MASKS)
    weights = "reformed"
    stores_weights = True

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.decompositions(layers)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        groups, actions = eligible(program, self.id, options.targets, MATRICES)
        spectra = [_spectrum(program, uses) for uses in groups]
        threshold = find_threshold([s.normalized for s in spectra], options.ratio)
        editor = Editor(program, by=self.id)
        factors: set[str] = set()
        kept = 0
        for spectrum in spectra:
            pruned = below(spectrum.normalized, threshold)
            rank = spectrum.most - pruned
            if is_low_rank(spectrum.shape, pruned, options.rule) and rank:
                stored, action = _factorize(editor, spectrum, rank)
                actions.append(action)
                factors |= stored
                kept += rank * sum(spectrum.shape)
            else:
                reason = f"not low-rank: {pruned} of {spectrum.most} are below the threshold"
                actions.append(Action.left(spectrum.name, reason, "whole"))
                kept += spectrum.shape[0] * spectrum.shape[1]
        if not factors:
            raise ModelError(
                f"{self.id}: no matrix is low-rank at the ratio {options.ratio:g}",
                fix="Raise `ratio`, or choose rule: break_even.",
            )
        if options.freeze:
            _freeze(editor, factors)
        return Result(editor.finish(), tuple(actions), _metrics(spectra, threshold, factors, kept))


@dataclass(frozen=True)
class Spectrum:
    """A matrix by its singular values.

    Attributes:
        uses: layers that read it.
        shape: (out, in).
        s: its singular values in float64, largest first.
    """

    uses: list[Layer]
    shape: tuple[int, int]
    s: Tensor

    @property
    def name(self) -> str:
        """Of its layers."""
        return names(self.uses)

    @property
    def most(self) -> int:
        """Its full rank."""
        return len(self.s)

    @property
    def normalized(self) -> Tensor:
        """Singular values from 1 to 0; all 1 where they do not differ."""
        return normalize(self.s)


def normalize(s: Tensor) -> Tensor:
    """(s - min) / (max - min), in float64; all 1 where the values differ by rounding alone."""
    s = s.double()
    width = s.max() - s.min()
    if width <= 1e-6 * s.max():
        return torch.ones_like(s)
    return (s - s.min()) / width


def below(normalized: Tensor, threshold: float) -> int:
    """Singular values that a threshold cuts."""
    return int((normalized < threshold).sum())


def find_threshold(normalized: Sequence[Tensor], ratio: float) -> float:
    """The largest threshold that cuts the share `ratio` of all values at most, by bisection."""
    wanted = round(ratio * sum(len(each) for each in normalized))
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if sum(below(each, middle) for each in normalized) <= wanted:
            low = middle
        else:
            high = middle
    return low


def is_low_rank(shape: tuple[int, int], pruned: int, rule: str) -> bool:
    """Whether a matrix (out, in) that loses `pruned` of its rank counts as low-rank."""
    most = min(shape)
    if rule == "half":
        return pruned / most > HALF
    return (most - pruned) * sum(shape) < shape[0] * shape[1]


def _matrix(program: Stored, layer: Layer) -> Tensor:
    weight = program.state[layer.weight].detach()
    return (weight.t() if layer.kind in TURNED else weight).double()


def _spectrum(program: Program, uses: list[Layer]) -> Spectrum:
    matrix = _matrix(program, uses[0])
    return Spectrum(uses, (matrix.shape[0], matrix.shape[1]), torch.linalg.svdvals(matrix))


def _factorize(editor: Editor, spectrum: Spectrum, rank: int) -> tuple[set[str], Action]:
    s = spectrum.s
    factors = split(_matrix(editor, spectrum.uses[0]), None, None, rank)
    stored = insert_pair(editor, spectrum.uses, factors)
    error = float(s[rank:].norm() / s.norm().clamp_min(1e-30))
    share = rank * sum(spectrum.shape) / (spectrum.shape[0] * spectrum.shape[1])
    what = f"rank {rank} of {spectrum.most}, {share:.0%} of its parameters"
    return set(stored), Action(spectrum.name, f"{what}, relative error {error:.2e}")


def _freeze(editor: Editor, factors: set[str]) -> None:
    for name, tensor in list(editor.state.items()):
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and name not in factors:
            editor.set_state(name, nn.Parameter(tensor.detach(), requires_grad=False))


def _metrics(
    spectra: Sequence[Spectrum], threshold: float, factors: set[str], kept: int
) -> dict[str, float]:
    all_ranks = sum(spectrum.most for spectrum in spectra)
    cut = sum(below(spectrum.normalized, threshold) for spectrum in spectra)
    return {
        "layers": len(factors) / 2,
        "threshold": threshold,
        "ranks_below_threshold": cut / all_ranks,
        "parameters_kept": kept / sum(s.shape[0] * s.shape[1] for s in spectra),
    }
