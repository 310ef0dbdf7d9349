"""Is a batch of rows of different lengths what every row is alone?

A kernel that keeps rows compact in its cache reads another mask than the program, so a whole batch
cannot be compared output by output. What counts is that each row gets the logits that the program
gives for its tokens alone, at once and without padding: after the prompt, and after further steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.backends.onnxruntime.attempt import Attempt, quantizers
from graphwright.backends.onnxruntime.cached_cases import cached_inputs
from graphwright.backends.onnxruntime.check import MOST, Differs, is_as_near
from graphwright.backends.onnxruntime.shared_cache import runner_of
from graphwright.backends.onnxruntime.steps.cached_attention import CACHE_FACT
from graphwright.ir.check.fidelity import compare
from graphwright.ir.check.precision import roundoff, run_in_double
from graphwright.ir.check.together import run_together
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.program import Program

LENGTHS = (5, 1, 3)
STEPS = 2
MOST_WINDOW = 64
"""Windows up to this size are crossed here; others by one row on a longer past."""


def check_rows(program: Program, made: Attempt, bound: float) -> None:
    """Checks a decoder by the runner that goes with it; other models have no rows.

    Raises:
        Differs: a row differs.
    """
    record = Generation.of(made.program)
    if record is None or record.kind != "decoder":
        return
    assert made.session is not None
    shares = CACHE_FACT in made.program.facts
    runner = runner_of(made.session, program.signature, record, shares_cache=shares)
    rounds = bool(quantizers(made.program))
    error = check_ragged(program, record, runner, bound, rounds=rounds)
    made.errors.append({"rows": [*LENGTHS], "relative": error})


def check_ragged(
    program: Program, record: Generation, runner: Runner, bound: float, *, rounds: bool
) -> float:
    """Largest relative error of a row's logits against the program on that row alone.

    Args:
        program: what the model was made of.
        record: of the program.
        runner: of the model.
        bound: relative error that needs no look in float64.
        rounds: whether the program rounds activations to codes, which may differ by one in two
            correct runs: then only what is no rounding is found.

    Raises:
        Differs: a row differs.
    """
    longer = record.sliding_window or 0
    longer = longer if longer <= MOST_WINDOW else 0
    lengths = [n + longer for n in LENGTHS]
    most = max(lengths) + STEPS
    if record.context_length and most > record.context_length:
        return 0.0
    (ids, *_) = cached_inputs(program, record, len(lengths), most, 0)
    runner.start(len(lengths), max(lengths) + 1)  # too small for the last step: it grows
    counts = torch.tensor(lengths)
    tokens = ids[:, : max(lengths)]
    found: list[tuple[str, tuple[Tensor, ...], Tensor]] = []
    for step in range(STEPS + 1):
        if step:
            tokens, counts = ids.gather(1, counts[:, None]), counts + 1
            if int(counts.max()) > runner.capacity:
                runner.grow(2 * runner.capacity)
        logits = runner.run(tokens, torch.ones_like(counts) if step else counts)
        for row, count in enumerate(counts.tolist()):
            where = f"row {row} of a batch with lengths {counts.tolist()}"
            found.append((where, _alone(program, record, ids[row : row + 1, :count]), logits[row]))
    place = [spec.name for spec in program.signature.outputs].index(record.logits)
    expected = run_together(program, [inputs for _, inputs, _ in found])
    worst = 0.0
    for (where, inputs, actual), outputs in zip(found, expected, strict=True):
        own = outputs[place][0, -1].float()
        error = compare(own, actual)
        if not error.within(MOST if rounds else bound):
            exact = run_in_double(program, inputs)[place][0, -1]
            if rounds or not is_as_near(exact, own, actual, roundoff(program)):
                raise Differs(
                    f"{where}: relative error {error.relative:.3g}, allowed {bound:.3g}", inputs
                )
        worst = max(worst, error.relative)
    return worst


def _alone(program: Program, record: Generation, ids: Tensor) -> tuple[Tensor, ...]:
    """The inputs of a text's beginning: no past, and states that have seen nothing."""
    drawn = cached_inputs(program, record, 1, ids.shape[1], 0)
    fresh = {record.ids: ids}
    named = {spec.name: t for spec, t in zip(program.signature.inputs, drawn, strict=True)}
    fresh |= {past: torch.zeros_like(named[past]) for past, _ in record.states}
    return tuple((named | fresh).values())
