"""Scores of structured pruning: accuracy at 25% and 50% fewer multiply-accumulates, no training.

    python tests/benchmarks/prune_scores.py                     digits nets, 6 minutes on a core
    python tests/benchmarks/prune_scores.py encoder             the sentence encoder, 6 minutes

Digits: nets in four styles, trained; the share of 500 held-out images that they label right. The
encoder: mean cosine of its sentence embeddings with the original's, held-out sentences; its
calibration data has no labels. `prune.zig` removes units until the share of multiply-accumulates is
gone, by each score with its default normalization; `auto` is what it does when nothing is said.
torch-pruning prunes with its default, group magnitude and the same ratio everywhere, the ratio that
gives the same multiply-accumulates. It is a row where the package can be imported
(tests/benchmarks/requirements.txt); a net that it cannot prune has a dash.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import _paths  # noqa: F401  puts tests/ and docs/demo on the path
import torch
from models import digits
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.prune import Zig

SHARES = (0.25, 0.5)
SCORES = ("auto", "random", "magnitude", "l1", "normalized_magnitude", "geometric_median",
          "bn_scale", "activation", "cosine", "taylor", "taylor_per_batch", "hesso",
          "fisher")  # fmt: skip
ONCE = ("taylor", "taylor_per_batch")
"""Scores whose default is several rounds: they have a row for a single one too."""
STEPS = 9
"""Halvings in the search for torch-pruning's ratio."""

Measure = Callable[[Any], float]
Rows = dict[str, list[list[float | None]]]


def ours(program: gw.Program, score: str, data: Any, measure: Measure) -> dict[str, list[Any]]:
    """A row for every number of rounds: the measure at each share; None where a score has none."""
    found = {}
    for rounds in (None, 1) if score in ONCE else (None,):
        options = {} if rounds is None else {"rounds": rounds}
        row: list[float | None] = []
        for share in SHARES:
            step = Zig(sparsity=share, of="macs", score=score, **options)
            try:
                row.append(measure(step.execute(program, Context(calibration=data)).program))
            except gw.errors.GraphwrightError:
                row.append(None)
        found[score if rounds is None else f"{score}, one round"] = row
    return found


def theirs(
    model: nn.Module, example: tuple[Any, ...], measure: Measure, **options: Any
) -> list[float | None]:
    """torch-pruning's default at the ratio that leaves as many multiply-accumulates."""
    import torch_pruning as tp

    def pruned(ratio: float) -> nn.Module:
        twin = copy.deepcopy(model)
        names = dict(twin.named_modules())
        given = {
            key: [names[n] for n in value] if isinstance(value, list)
            else {names[n]: v for n, v in value.items()} if isinstance(value, Mapping) else value
            for key, value in options.items()
        }  # fmt: skip
        if given.get("prune_num_heads"):
            given["head_pruning_ratio"] = ratio
        pruner = tp.pruner.BasePruner(
            twin, example, importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio, **given,
        )  # fmt: skip
        pruner.step()
        return twin

    def macs(candidate: nn.Module) -> float:
        return float(tp.utils.count_ops_and_params(candidate, example)[0])

    row: list[float | None] = []
    whole = macs(model)
    for share in SHARES:
        low, high = 0.0, 0.95
        try:
            for _ in range(STEPS):
                middle = (low + high) / 2
                enough = 1 - macs(pruned(middle)) / whole >= share
                low, high = (low, middle) if enough else (middle, high)
            row.append(measure(pruned(high).eval()))
        except Exception as error:  # whatever a peer raises on a net it cannot prune
            print(f"torch-pruning: {type(error).__name__}: {str(error)[:90]}", file=sys.stderr)
            row.append(None)
    return row


def on_digits(names: list[str]) -> Rows:
    """All rows on the digits nets, a list per net."""
    x, labels = digits.data()[:2]
    rows: Rows = {}
    for name in names:
        model = digits.trained(name)
        program = digits.traced(model)
        parts = zip(x[:512].split(32), labels[:512].split(32), strict=True)
        data = [{"x": images, "labels": own} for images, own in parts]
        for score in SCORES:
            for row, values in ours(program, score, data, digits.accuracy).items():
                rows.setdefault(row, []).append(values)
            print(f"{name}: {score}", file=sys.stderr, flush=True)
        if has_peer():
            last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
            heads = {n: 4 for n, _ in model.named_modules() if n.endswith("qkv")}
            more: dict[str, Any] = {"num_heads": heads} if heads else {}
            values = theirs(model, (x[:4],), digits.accuracy, ignored_layers=[last], **more)
            rows.setdefault("torch-pruning, default", []).append(values)
    return rows


def on_encoder() -> Rows:
    """All rows on the sentence encoder."""
    from models import encoder

    program, data = encoder.program(), encoder.calibration(8)[:12]
    held_out = encoder.held_out(8)[:20]
    reference = encoder.embeddings(program, held_out)

    def measure(candidate: Any) -> float:
        return encoder.mean_cosine(reference, encoder.embeddings(candidate, held_out))

    rows: Rows = {}
    for score in [s for s in SCORES if s not in ("fisher", "bn_scale")]:
        for row, values in ours(program, score, data, measure).items():
            rows.setdefault(row, []).append(values)
        print(f"encoder: {score}", file=sys.stderr, flush=True)
    if has_peer():
        model = encoder.module()
        stream = [n for n, m in model.named_modules()
                  if n.endswith("output.dense") or isinstance(m, nn.Embedding)]  # fmt: skip
        heads = {n: 12 for n, _ in model.named_modules()
                 if n.endswith((".query", ".key", ".value"))}  # fmt: skip
        options = {"ignored_layers": stream, "num_heads": heads, "prune_num_heads": True,
                   "prune_head_dims": False}  # fmt: skip
        example = tuple(data[4].values())
        rows["torch-pruning, default"] = [theirs(model, example, measure, **options)]
    return rows


def has_peer() -> bool:
    """Whether torch-pruning can be imported."""
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        return False
    return True


def table(rows: Rows, names: list[str]) -> None:
    """Prints means first, then every net."""
    ends = [f"{name} {share:.0%}" for name in names for share in SHARES]
    if len(names) > 1:
        ends = [f"mean {share:.0%}" for share in SHARES] + ends
    print("| score | " + " | ".join(ends) + " |")
    print("| --- |" + " ---: |" * len(ends))
    for row, nets in rows.items():
        cells = [value for net in nets for value in net]
        if len(names) > 1:
            means = []
            for number in range(len(SHARES)):
                here = [net[number] for net in nets]
                known = [value for value in here if value is not None]
                means.append(statistics.mean(known) if len(known) == len(here) else None)
            cells = [*means, *cells]
        shown = ["-" if value is None else f"{value:.3f}" for value in cells]
        print(f"| {row} | " + " | ".join(shown) + " |")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("nets", nargs="*", default=list(digits.NETS))
    chosen = parser.parse_args().nets
    if chosen == ["encoder"]:
        table(on_encoder(), chosen)
        return
    dense = [digits.accuracy(digits.trained(name)) for name in chosen]
    print("dense: " + ", ".join(f"{n} {a:.3f}" for n, a in zip(chosen, dense, strict=True)) + "\n")
    table(on_digits(chosen), chosen)


if __name__ == "__main__":
    main()
