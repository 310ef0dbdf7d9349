"""All cases of the sweep, by theme."""

from __future__ import annotations

from sweep.cases import Case, Theme
from sweep.themes import images, layers, pointwise, products, reductions, shapes, sizes, state

THEMES: tuple[Theme, ...] = (
    *pointwise.THEMES,
    *reductions.THEMES,
    *shapes.THEMES,
    *products.THEMES,
    *images.THEMES,
    *layers.THEMES,
    *sizes.THEMES,
    *state.THEMES,
)
CASES: tuple[Case, ...] = tuple(case for theme in THEMES for case in theme.cases)
