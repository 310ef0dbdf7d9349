"""The tuning engine: one training loop for every pass that trains."""

from graphwright.ir.tune.engine import tune
from graphwright.ir.tune.history import History, Tuned
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.ir.tune.options import OwnLoss, TuneOptions

__all__ = ["History", "Hook", "Moment", "OwnLoss", "TuneOptions", "Tuned", "tune"]
