"""Resize: networks of another size, from one that is trained."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
