"""Decomposition: layers as several smaller ones that compute nearly the same."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
