"""The solvers by name."""

from __future__ import annotations

from typing import Any

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.solvers.base import Solver
from graphwright.ir.sampling.solvers.dpm import Dpmpp2m, Dpmpp2s, DpmppSinglestep
from graphwright.ir.sampling.solvers.first import DoubleStep, Euler, EulerAncestral, Lcm
from graphwright.ir.sampling.solvers.heun import Heun
from graphwright.ir.sampling.solvers.jump import Jump
from graphwright.ir.sampling.solvers.sde import PredictorCorrector, ReverseSde
from graphwright.ir.sampling.solvers.unipc import Unipc

SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "ddim": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "dpmpp_2m": Dpmpp2m,
    "dpmpp_2s": Dpmpp2s,
    "dpmpp_singlestep": DpmppSinglestep,
    "unipc": Unipc,
    "lcm": Lcm,
    "jump": Jump,
    "double_step": DoubleStep,
    "reverse_sde": ReverseSde,
    "predictor_corrector": PredictorCorrector,
}
"""`ddim` and `euler` are one formula, on any schedule."""


def make_solver(name: str, **options: Any) -> Solver:
    """A solver with its options.

    Raises:
        ArgumentError: there is none of that name, or it has no such option.
    """
    from pydantic import ValidationError

    if name not in SOLVERS:
        raise ArgumentError(f"no solver named {name!r}; there are {', '.join(SOLVERS)}")
    try:
        return SOLVERS[name](**options)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ArgumentError(f"solver {name}: {said}") from None
