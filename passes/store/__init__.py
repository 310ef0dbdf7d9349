"""How a program is written to files."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
