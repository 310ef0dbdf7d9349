"""Compensation: what compression took away, given back by corrections found without training."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
