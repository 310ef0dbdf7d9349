"""Operators of the papers, put into a trained network: they tune, fuse and export like the rest."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
