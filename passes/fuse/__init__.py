"""Neighbouring layers as one: skips into convolutions, projections side by side."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
