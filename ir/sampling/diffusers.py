"""The configuration of a diffusers scheduler, in our terms. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.schedule import NoiseSchedule

PIPELINE = "pipeline"
"""Entry of a program's facts: configurations of its pipeline, `scheduler` and `guider`."""

_SOLVERS = {
    "DDIMScheduler": ("ddim", "leading"),
    "DDPMScheduler": ("ddim", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", "linspace"),
    "HeunDiscreteScheduler": ("heun", "linspace"),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace"),
    "DPMSolverSinglestepScheduler": ("dpmpp_singlestep", "linspace"),
    "UniPCMultistepScheduler": ("unipc", "linspace"),
    "LCMScheduler": ("lcm", "leading"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "uniform"),
}
_MULTISTEP = ("dpmpp_2m", "dpmpp_singlestep", "unipc")
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "euler_at_final": (False,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "use_dynamic_shifting": (False,),
    "stochastic_sampling": (False,),
    "invert_sigmas": (False,),
    "final_sigmas_type": ("zero",),
    "disable_corrector": ([],),
    "lower_order_final": (True,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "solver_p": (None,),
    "variance_type": ("fixed_small", None),
}
"""Options whose other values are not what our solvers compute; a value outside is refused."""

_SET_BY_ITSELF = {"DPMSolverSinglestepScheduler": ("lower_order_final",)}
"""Options that a scheduler sets to what ours compute, whatever its configuration says: here because
it ends without noise."""


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler's configuration says.

    Attributes:
        parameterization: meaning of the network's output.
        schedule: noise levels.
        grid: choice of the levels.
        solver: name of our solver.
        options: options of the solver.
    """

    parameterization: str
    schedule: NoiseSchedule
    grid: Grid
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """A `scheduler_config.json` in our terms.

    Raises:
        ArgumentError: a scheduler, or a value of an option, that no solver of ours computes.
    """
    kind = str(config.get("_class_name"))
    if kind not in _SOLVERS:
        raise ArgumentError(
            f"no solver of ours computes the scheduler {kind}",
            fix=f"Known are {', '.join(_SOLVERS)}; or declare schedule and solver yourself.",
        )
    solver, spacing = _SOLVERS[kind]
    for option, allowed in _MUST_BE.items():
        if (
            option not in _SET_BY_ITSELF.get(kind, ())
            and option in config
            and config[option] not in allowed
        ):
            raise ArgumentError(
                f"{kind} with {option} = {config[option]!r} is not what our {solver} computes",
                fix=f"It has to be {' or '.join(repr(v) for v in allowed)}.",
            )
    if kind.startswith("FlowMatch"):
        return _flow(config, solver)
    spacing = str(config.get("timestep_spacing", spacing))
    if solver == "ddim" and spacing == "linspace":
        raise ArgumentError(
            f"{kind} with the spacing linspace leaves its own grid: it steps by a fixed stride",
            fix="Set `timestep_spacing` to leading or trailing.",
        )
    if kind == "LCMScheduler":
        spacing = "lcm"
    elif by_sigma := _by_sigma(config, solver, spacing):
        return Scheduler(_prediction(config), _table(config), by_sigma, solver)
    elif solver in _MULTISTEP:
        spacing = _multistep(spacing)
    first = kind in ("DDIMScheduler", "LCMScheduler") and not config.get("set_alpha_to_one", True)
    grid = Grid(
        spacing=spacing,  # type: ignore[arg-type]  # checked by the model
        steps_offset=int(config.get("steps_offset", 0)) if spacing == "leading" else 0,
        original_steps=int(config.get("original_inference_steps", 50)),
        final="first" if first else "zero",
    )
    options = {"eta": 1.0} if kind == "DDPMScheduler" else {}
    if kind == "LCMScheduler":
        options = {"timestep_scaling": float(config.get("timestep_scaling", 10.0))}
    return Scheduler(_prediction(config), _table(config), grid, solver, options)


def _by_sigma(config: Mapping[str, Any], solver: str, spacing: str) -> Grid | None:
    """The grid of Karras or of exponential levels; None for one of steps.

    Multistep schedulers run between the ends of the table and tell the network whole steps: the
    nearest one on Karras' levels (but for 2M on cosine tables), the one below on exponential ones.
    Of the first exponential level they tell the step before the last of the table, because rounding
    leaves the last one a hair above; here it is told the last one.
    """
    karras, exponential = (
        bool(config.get(f"use_{name}_sigmas")) for name in ("karras", "exponential")
    )
    if not (karras or exponential):
        return None
    if karras and exponential:
        raise ArgumentError("levels are Karras' or exponential, and both are asked for")
    if solver not in _MULTISTEP:
        if spacing != "linspace":
            raise ArgumentError(
                f"Karras' and exponential levels of {solver} between the steps of the spacing "
                f"{spacing} are not known to us",
                fix="Set `timestep_spacing: linspace`, whose ends are those of the table.",
            )
        return Grid(spacing="karras" if karras else "log_snr")
    if exponential:
        return Grid(spacing="log_snr", told="floored")
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2" and solver == "dpmpp_2m"
    return Grid(spacing="karras", told="floored" if cosine else "rounded")


def _multistep(spacing: str) -> str:
    if spacing != "linspace":
        raise ArgumentError(
            f"the spacing {spacing} of a multistep scheduler is not known to us",
            fix="Set `timestep_spacing: linspace`, the default of diffusers.",
        )
    return "multistep"


def _prediction(config: Mapping[str, Any]) -> str:
    name = str(config.get("prediction_type", "epsilon"))
    if name not in _PREDICTIONS:
        raise ArgumentError(
            f"the prediction type {name!r} is none of {', '.join(_PREDICTIONS)}",
        )
    return _PREDICTIONS[name]


def _table(config: Mapping[str, Any]) -> NoiseSchedule:
    betas = config.get("trained_betas")
    return NoiseSchedule(
        kind="table",
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        beta_schedule=config.get("beta_schedule", "linear"),
        beta_start=float(config.get("beta_start", 0.0001)),
        beta_end=float(config.get("beta_end", 0.02)),
        trained_betas=None if betas is None else tuple(float(b) for b in betas),
    )


def _flow(config: Mapping[str, Any], solver: str) -> Scheduler:
    steps = int(config.get("num_train_timesteps", 1000))
    shift = float(config.get("shift", 1.0))
    schedule = NoiseSchedule(kind="flow", time_scale=float(steps), shift=shift)
    # diffusers' grid runs between the shifted ends of its table, and is shifted once more
    least = schedule.shifted(1.0 / steps)
    return Scheduler("flow", schedule, Grid(spacing="uniform", start=1.0, end=least), solver)


def read_guider(config: Mapping[str, Any]) -> dict[str, float]:
    """The options of sample.cfg that a `guider_config.json` says.

    Only ClassifierFreeGuidance is the same thing here. AdaptiveProjectedGuidance of diffusers acts
    on the network's own output, and sample.apg, as its paper, on the data.

    Raises:
        ArgumentError: another guider, or one that is switched off.
    """
    kind = str(config.get("_class_name"))
    if kind != "ClassifierFreeGuidance":
        raise ArgumentError(
            f"no guider of ours computes the guider {kind}",
            fix="Known is ClassifierFreeGuidance; or choose a pass of guidance and its options "
            "yourself.",
        )
    if config.get("enabled") is False:
        raise ArgumentError("the guider is switched off", fix="Leave the pass of guidance out.")
    scale = float(config.get("guidance_scale", 7.5))
    if config.get("use_original_formulation"):
        scale += 1.0  # it counts from the prediction with the condition
    found = {"guidance_scale": scale}
    for name, own in (("guidance_rescale", 0.0), ("start", 0.0), ("stop", 1.0)):
        found[name] = float(config.get(name, own))
    return found
