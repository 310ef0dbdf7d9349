"""Structural pruning of the whole zoo at 50%, side by side with torch-pruning.

    pip install --no-deps torch-pruning==1.6.1
    python tests/benchmarks/channel_groups.py               everything
    python tests/benchmarks/channel_groups.py bert resnet   some of it

For each architecture: processor seconds of one thread to build the groups (ours after tracing,
which is not counted; theirs with the one forward pass that it records), the share of parameters
left after half of the units of every group are removed, and the relative difference between the
outputs of the cut model and of the same model with these slices zeroed.
torch-pruning runs in its default use: magnitude importance, ratio 0.5, the last linear layer
ignored, keyword inputs through `forward_fn`, all output tensors through `output_transform` (their
sums would have no channel dimension, and its bookkeeping of outputs then fails). An error of `inf`
means that its outputs changed their shape: it prunes what no layer is given for to ignore.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

Row = dict[str, Any]


def main() -> None:
    import scipy.sparse.csgraph  # noqa: F401  imported once, before the first fork
    import torch
    from conformance import zoo

    import graphwright.ir.channels  # noqa: F401

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per model and tool")
    parser.add_argument("--ours", action="store_true", help="leave torch-pruning out")
    options = parser.parse_args()
    tools = {"ours": ours} if options.ours else {"ours": ours, "torch-pruning": theirs}
    rows: dict[str, dict[str, Row]] = {}
    print(
        f"{'architecture':28}" + "".join(f"{t:>12}{'s':>8}{'left':>7}{'error':>10}" for t in tools)
    )
    for name in options.names or zoo.load():
        rows[name] = {tool: in_child(run, name, options.timeout) for tool, run in tools.items()}
        print(f"{name:28}" + "".join(_cells(row) for row in rows[name].values()), flush=True)
    for tool in tools:
        done = [row[tool] for row in rows.values() if row[tool]["status"] == "ok"]
        exact = sum(row["error"] < 1e-5 for row in done)
        print(
            f"{tool}: {len(done)} of {len(rows)} models run at 50%, {exact} of them exact to 1e-5"
        )


def _cells(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status'][:11]:>12}{'':8}{'':7}{'':10}"
    return f"{'ok':>12}{row['seconds']:8.2f}{row['left']:7.2f}{row['error']:10.1e}"


def in_child(run: Any, name: str, timeout: float) -> Row:
    """Runs one tool on one model in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours_end, theirs_end = context.Pipe()
    process = context.Process(target=_child, args=(run, name, theirs_end))
    process.start()
    row: Row = {"status": "time out"}
    if ours_end.poll(timeout):
        try:
            row = ours_end.recv()
        except EOFError:
            row = {"status": "crashed"}
    process.kill()
    process.join()
    return row


def _child(run: Any, name: str, pipe: Any) -> None:
    import logging
    import warnings

    from conformance import zoo

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        pipe.send(run(zoo.load()[name]))
    except Exception as error:
        pipe.send({"status": type(error).__name__, "message": str(error)})


def ours(architecture: Any) -> Row:
    """Groups, zero and cut of a traced program; every second unit of every group."""
    import graphwright as gw

    inputs = {**architecture.inputs(), **architecture.constants}
    program = gw.trace(architecture.build(), inputs, dynamic=architecture.dynamic, check=False)
    start = time.process_time()
    groups = gw.channel_groups(program)
    seconds = time.process_time() - start
    picks = {g: list(range(0, g.units - 1, 2)) for g in groups if g.prunable}
    if not picks:
        return {"status": "no group"}
    masked, smaller = gw.zero(program, picks), gw.cut(program, picks)
    before, after = (sum(p.numel() for p in q.parameters().values()) for q in (program, smaller))
    error = largest_error(masked.run_flat(program.examples), smaller.run_flat(program.examples))
    return {"status": "ok", "seconds": seconds, "left": after / before, "error": error}


def theirs(architecture: Any) -> Row:
    """torch-pruning on the eager model; masked by zeroing what its groups name."""
    import torch
    import torch_pruning as tp

    model, inputs = architecture.build(), architecture.inputs()
    inputs = {**inputs, **architecture.constants}
    masked = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    start = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=linears[-1:], forward_fn=lambda m, x: m(**x),
        output_transform=lambda out: [t for t in tensors_of(out) if t.requires_grad],
    )  # fmt: skip
    seconds = time.process_time() - start
    places = {id(part): path for path, part in [*model.named_modules(), *model.named_parameters()]}
    left: dict[Any, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            _zero(masked, dependency, indices, places, left)
        group.prune()
    with torch.no_grad():
        expected, actual = tensors_of(masked(**inputs)), tensors_of(model(**inputs))
    after = sum(p.numel() for p in model.parameters())
    if after == before:
        return {"status": "no group"}
    error = largest_error(expected, actual)
    return {"status": "ok", "seconds": seconds, "left": after / before, "error": error}


def _zero(masked: Any, dependency: Any, indices: Any, places: Any, left: Any) -> None:
    """Zeroes in the copy what a dependency of a torch-pruning group removes.

    Its indices count what earlier groups have left, `left` maps them to the original positions.
    """
    import torch

    layer, reads = dependency.target.module, "in_channels" in dependency.handler.__name__
    path = places.get(id(layer))
    if path is None:
        return
    if isinstance(layer, torch.nn.Parameter):
        targets = [(masked.get_parameter(path), layer.dim() - 1)]
    else:
        turned = isinstance(layer, torch.nn.modules.conv._ConvTransposeNd | torch.nn.Embedding)
        own = masked.get_submodule(path).parameters(recurse=False)
        dim = int(reads != turned)
        targets = [(p, dim if p.dim() > 1 else 0) for p in own
                   if p.dim() > 1 or not reads or _is_norm(layer)]  # fmt: skip
    for p, dim in targets:
        positions = left.setdefault((id(p), dim), list(range(p.shape[dim])))
        gone = set(indices)
        where = [original for i, original in enumerate(positions) if i in gone]
        left[id(p), dim] = [original for i, original in enumerate(positions) if i not in gone]
        with torch.no_grad():
            p.index_fill_(dim, torch.tensor(where, dtype=torch.long), 0)


def _is_norm(layer: Any) -> bool:
    return "Norm" in type(layer).__name__


def tensors_of(out: Any) -> list[Any]:
    """All tensors of an output, in order."""
    import torch

    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for part in out.values() for t in tensors_of(part)]
    if isinstance(out, list | tuple):
        return [t for part in out for t in tensors_of(part)]
    return []


def largest_error(expected: Any, actual: Any) -> float:
    """Largest relative difference of paired outputs; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.is_floating_point() and a.numel():
            if a.shape != b.shape:
                return float("inf")
            norm = a.detach().double().norm().clamp_min(1e-12)
            worst = max(worst, float((a.detach().double() - b.detach().double()).norm() / norm))
    return worst


if __name__ == "__main__":
    main()
