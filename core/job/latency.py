"""Latency of several callables, measured in alternation so that they share the machine's moods."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.files import LoadedModel
    from graphwright.ir.program import Program
    from graphwright.job.run import Run

DEFAULT_BUDGET_S = 3.0
"""Time that measuring may take, in seconds, warm-up included."""

_WARM_UP_SHARE = 0.25
_MOST_ROUNDS = 400
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Times of one callable.

    Attributes:
        median_ms: median time of one call, in milliseconds.
        iqr_ms: distance between the quartiles: half of all calls lie within it.
        runs: calls measured.
    """

    median_ms: float
    iqr_ms: float
    runs: int


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    budget_s: float = DEFAULT_BUDGET_S,
    *,
    synchronize: Callable[[], object] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times every candidate once per round, in an order that turns by one from round to round.

    Rounds go on until the budget is spent, but at least three: a call that takes longer than the
    budget is measured all the same.

    Args:
        candidates: callables without arguments, by name.
        budget_s: seconds to spend in all.
        synchronize: waits for the device to finish; called before each clock reading.
        progress: called with (description, done, total) in milliseconds of the budget.
    """
    wait = synchronize or (lambda: None)
    begin = time.perf_counter()
    _warm_up(candidates, budget_s * _WARM_UP_SHARE, wait)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    was_enabled = gc.isenabled()
    gc.disable()  # a collection inside one candidate's call would be counted as its own
    try:
        for round_index in range(_MOST_ROUNDS):
            spent = time.perf_counter() - begin
            if round_index >= _LEAST_ROUNDS and spent >= budget_s:
                break
            if progress is not None:
                progress(
                    "latency", min(int(spent * 1000), int(budget_s * 1000)), int(budget_s * 1000)
                )
            for name in order:
                samples[name].append(_time_once(candidates[name], wait))
            order.append(order.pop(0))
    finally:
        if was_enabled:
            gc.enable()
    return {name: _timing(times) for name, times in samples.items()}


def measure_latency(
    before: Callable[..., object],
    compiled: Mapping[str, Callable[..., object]],
    inputs: Sequence[Any],
    *,
    device: str = "cpu",
    budget_s: float = DEFAULT_BUDGET_S,
    progress: Callable[[str, int, int], None] | None = None,
    warn: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the report's `latency`: the original against every artifact on the same inputs.

    Args:
        before: the original model, called with `inputs`.
        compiled: the artifacts by backend, called with the same inputs.
        inputs: tensors in call order.
        device: `cpu` or `cuda`; on the latter every reading waits for the device.
        budget_s: seconds to spend in all.
        progress: see `alternate`.
        warn: told why nothing was measured.

    Returns:
        One row per artifact; none for a sampling program, whose calls are others than its
        network's. `speedup` is the ratio of the medians. Threads are torch's.
    """
    import torch

    if any(hasattr(call, "sampler") for call in compiled.values()):
        if warn is not None:
            warn("latency was not measured: a call of a sampling program is not one of its network")
        return []
    if not compiled:
        return []
    candidates = {"": before, **compiled}
    with torch.inference_mode():
        timings = alternate(
            {name: _bind(call, inputs) for name, call in candidates.items()},
            budget_s,
            synchronize=torch.cuda.synchronize if device.startswith("cuda") else None,
            progress=progress,
        )
    reference = timings.pop("")
    return [
        {
            "backend": name,
            "device": device,
            "threads": torch.get_num_threads(),
            "before_ms": reference.median_ms,
            "after_ms": timing.median_ms,
            "speedup": reference.median_ms / timing.median_ms,
            "before_iqr_ms": reference.iqr_ms,
            "after_iqr_ms": timing.iqr_ms,
            "runs": timing.runs,
            "shapes": [list(value.shape) for value in inputs],
        }
        for name, timing in timings.items()
    ]


def _bind(call: Callable[..., object], inputs: Sequence[Any]) -> Callable[[], object]:
    return lambda: call(*inputs)


def _warm_up(
    candidates: Mapping[str, Callable[[], object]], budget_s: float, wait: Callable[[], object]
) -> None:
    """At least two calls each (the first may compile), more while there is time."""
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (time.perf_counter() - begin < budget_s and calls < 20):
        for call in candidates.values():
            call()
        calls += 1
    wait()


def _time_once(call: Callable[[], object], wait: Callable[[], object]) -> float:
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - begin) * 1000


def _timing(times: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, high - low, len(times))


def against_the_original(
    loaded: LoadedModel,
    original: Program,
    compiled: Mapping[str, Any],
    run: Run,
) -> list[dict[str, Any]]:
    """`measure_latency` against the loaded model as it is called, on the example inputs."""
    from torch import nn

    from graphwright.job.build import original_runner
    from graphwright.job.decode import timed_inputs

    device = run.settings.device
    examples = [tensor.to(device) for tensor in timed_inputs(original)]
    if loaded.module is None or (loaded.is_fixed and loaded.change.dtype is not None):
        before: Any = original
    else:
        loaded.module.to(device)
        before = original_runner(loaded, original, run.spec.model)
    for lowered in compiled.values():
        if isinstance(lowered, nn.Module):
            lowered.to(device)
    return measure_latency(before, compiled, examples, device=device, warn=run.warn)
