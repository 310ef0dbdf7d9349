"""Pruning: channels that leave the graph, and weights that become zero."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
