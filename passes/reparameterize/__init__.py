"""Other weights for the same function: branches folded or added, scales moved, forms exchanged."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
