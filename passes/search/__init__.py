"""Settings of single layers that are searched for, judged by the outputs of the whole program."""

from graphwright.passes import lazy_family

__getattr__ = lazy_family(__name__, __path__)
