"""Adapters: few parameters beside frozen layers, to be tuned, merged or shipped by themselves."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
