"""Training as a pass of its own."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
