"""Sampling programs of denoisers: guidance, caches and correctors around one network."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
