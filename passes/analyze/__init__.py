"""What a program's layers do to each other, reported and noted for later passes."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
