"""M-FAC: time of its products against the number of weights, and what it is worth on the small GPT.

    python tests/benchmarks/mfac.py            both
    python tests/benchmarks/mfac.py time       times alone
    python tests/benchmarks/mfac.py gpt        perplexity alone

Times are processor time, the best of three, one thread, 32 gradients in float32. The exponent is
the slope of log(time) over log(d); 1 is linear.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import _paths  # noqa: F401  puts tests/ on the path
import numpy as np
import torch

from graphwright.ir.context import Context
from graphwright.ir.tune.fisher import Fisher, Window
from graphwright.passes.prune import Mfac

GRADIENTS = 32
SIZES = tuple(2**e for e in (17, 18, 19, 20, 21))
RUNS = ((0.5, 1), (0.6, 1), (0.7, 1), (0.7, 4))
"""Shares of zeros, and in how many sub-steps."""
LINEAR = ("*", "!embedding", "!head")


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["time", "gpt"]
    if "time" in wanted:
        times()
    if "gpt" in wanted:
        perplexities()


def times() -> None:
    columns: dict[str, list[float]] = {}
    for d in SIZES:
        for name, seconds in measured(d).items():
            columns.setdefault(name, []).append(seconds)
    print("| d | " + " | ".join(f"{name}, ms" for name in columns) + " |")
    print("| ---: |" + " ---: |" * len(columns))
    for row, d in enumerate(SIZES):
        cells = " | ".join(f"{values[row] * 1e3:.1f}" for values in columns.values())
        print(f"| {d:,} | {cells} |")
    slopes = [np.polyfit(np.log(SIZES), np.log(values), 1)[0] for values in columns.values()]
    print("| exponent | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |\n")


def measured(d: int) -> dict[str, float]:
    """Seconds by what is done."""
    gradients, x = torch.randn(GRADIENTS, d), torch.randn(d)
    full, blocked = Fisher(gradients), Fisher(gradients, block=128)
    window = Window(d, GRADIENTS)
    for gradient in gradients:
        window.add(gradient)

    def step() -> None:
        window.add(x)
        window.product(x)

    return {
        "set-up": best(lambda: Fisher(gradients)),
        "F^-1 x": best(lambda: full.product(x)),
        "diagonal": best(full.diagonal),
        "F^-1 x, blocks of 128": best(lambda: blocked.product(x)),
        "optimizer's step": best(step),
    }


def best(run: Callable[[], object]) -> float:
    found = []
    for _ in range(3):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def perplexities() -> None:
    from models import gpt

    program = gpt.program()
    calibration = gpt.calibration(512)
    print(f"dense: perplexity {gpt.perplexity(program):.3f}\n")
    print("| zeros | magnitude | M-FAC | sub-steps |\n| --- | ---: | ---: | ---: |")
    context = Context(calibration=calibration)
    for share, steps in RUNS:
        options = {"sparsity": share, "steps": steps, "loss": "next_token", "batch_size": 8,
                   "targets": LINEAR}  # fmt: skip
        magnitude = gpt.perplexity(zeroed(program, share))
        mine = gpt.perplexity(Mfac(**options).execute(program, context).program)
        print(f"| {share:.0%} | {magnitude:.3f} | {mine:.3f} | {steps} |", flush=True)


def zeroed(program, share: float):  # type: ignore[no-untyped-def]
    """The same share of zeros by magnitude, over all of the same layers."""
    from graphwright.ir.layers.selectors import select

    names = [layer.weight for layer in select(program, LINEAR, {"linear"})]
    sizes = torch.cat([program.state[n].detach().abs().flatten() for n in names])
    limit = sizes.kthvalue(int(share * len(sizes))).values
    state = {n: torch.nn.Parameter(program.state[n].detach() * (program.state[n].abs() > limit))
             for n in names}  # fmt: skip
    return program.replace(state={**program.state, **state})


if __name__ == "__main__":
    main()
