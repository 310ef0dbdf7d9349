"""Structural pruning of the whole zoo at 50%, side by side with torch-pruning.

    pip install --no-deps -r tests/benchmarks/requirements.txt
    python tests/benchmarks/channel_groups.py               everything
    python tests/benchmarks/channel_groups.py bert resnet   some of it

For each architecture: processor seconds of one thread to build the groups (ours after tracing,
which is not counted; theirs with the one forward pass that it records), the share of parameters
left after half of the units of every group are removed, and the relative difference between the
outputs of the cut model and of the same model with these slices zeroed.
torch-pruning runs as its documentation says: magnitude importance, ratio 0.5, the layers whose
results reach the outputs without another layer between given to ignore (found on our traced
graph, which costs it nothing), keyword inputs through `forward_fn`, all output tensors through
`output_transform` (their sums would have no channel dimension, and its bookkeeping of outputs then
fails). An error of `inf` means that its outputs changed their shape all the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

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
    parser.add_argument("--slice", default="0/1", help="i/n: every n-th architecture from i on")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--ours", action="store_true", help="leave torch-pruning out")
    options = parser.parse_args()
    tools = {"ours": ours} if options.ours else {"ours": ours, "torch-pruning": theirs}
    rows: dict[str, dict[str, Row]] = {}
    print(
        f"{'architecture':28}" + "".join(f"{t:>12}{'s':>8}{'left':>7}{'error':>10}" for t in tools)
    )
    first, step = map(int, options.slice.split("/"))
    for name in options.names or list(zoo.load())[first::step]:
        last: list[str] = []
        rows[name] = {}
        for tool, run in tools.items():
            row = in_child(run, name, last, options.timeout)
            last, rows[name][tool] = row.pop("last", last), row
        print(f"{name:28}" + "".join(_cells(row) for row in rows[name].values()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    summary(rows, list(tools))


def summary(rows: dict[str, dict[str, Row]], tools: list[str]) -> None:
    """Prints the counts, and the architectures where ours takes longer."""
    for tool in tools:
        done = [row[tool] for row in rows.values() if row[tool]["status"] == "ok"]
        exact = sum(row["error"] < 1e-5 for row in done)
        slow = max((row["seconds"] for row in done), default=0)
        print(f"{tool}: {len(done)} of {len(rows)} models run at 50%, {exact} of them exact to "
              f"1e-5; the slowest groups take {slow:.2f} s")  # fmt: skip
    both = [(name, row["ours"], row["torch-pruning"]) for name, row in rows.items()
            if all(part.get("seconds") for part in row.values()) and len(row) == 2]  # fmt: skip
    slower = [name for name, a, b in both if b["seconds"] > 1 and a["seconds"] > b["seconds"]]
    if both:
        print(f"torch-pruning over 1 s: {sum(b['seconds'] > 1 for _, _, b in both)} models; "
              f"ours slower on {slower or 'none of them'}")  # fmt: skip


def _cells(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status'][:11]:>12}{'':8}{'':7}{'':10}"
    return f"{'ok':>12}{row['seconds']:8.2f}{row['left']:7.2f}{row['error']:10.1e}"


def in_child(run: Any, name: str, last: list[str], timeout: float) -> Row:
    """Runs one tool on one model in a process of its own.

    Args:
        run: `ours` or `theirs`.
        name: of the architecture.
        last: names of the layers that reach the outputs.
        timeout: seconds.
    """
    context = multiprocessing.get_context("fork")
    ours_end, theirs_end = context.Pipe()
    process = context.Process(target=_child, args=(run, name, last, theirs_end))
    process.start()
    theirs_end.close()
    row: Row = {"status": "time out"}
    if ours_end.poll(timeout):
        try:
            row = ours_end.recv()
        except EOFError:
            row = {"status": "crashed"}
    process.kill()
    process.join()
    return row


def _child(run: Any, name: str, last: list[str], pipe: Any) -> None:
    import logging
    import warnings

    from conformance import zoo

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        pipe.send(run(zoo.load()[name], last))
    except Exception as error:
        pipe.send({"status": type(error).__name__, "message": str(error)})


def ours(architecture: Any, _: list[str]) -> Row:
    """Groups, zero and cut of a traced program; every second unit of every group."""
    import graphwright as gw

    inputs = {**architecture.inputs(), **architecture.constants}
    program = gw.trace(architecture.build(), inputs, dynamic=architecture.dynamic, check=False)
    start = time.process_time()
    groups = gw.channel_groups(program)
    seconds = time.process_time() - start
    picks = {g: list(range(0, g.units - 1, 2)) for g in groups if g.prunable}
    last = last_layers(program)
    if not picks:
        return {"status": "no group", "last": last}
    masked, smaller = gw.zero(program, picks), gw.cut(program, picks)
    before, after = (sum(p.numel() for p in q.parameters().values()) for q in (program, smaller))
    error = largest_error(masked.run_flat(program.examples), smaller.run_flat(program.examples))
    return {"status": "ok", "seconds": seconds, "left": after / before, "error": error,
            "last": last}  # fmt: skip


def last_layers(program: Any) -> list[str]:
    """Modules whose results reach an output without another layer between, norms passed."""
    from graphwright.ir.layers.selectors import layers

    found = {layer.node: layer for layer in layers(program)}
    norms = {node for node, layer in found.items() if layer.kind.endswith("_norm")}
    stack = [node for node in program.graph.nodes if node.op == "output"]
    seen: set[Any] = set(stack)
    names: dict[str, None] = {}
    while stack:
        node = stack.pop()
        if node in found:
            names.update(dict.fromkeys(found[node].names))
        elif node.op == "get_attr":
            names[str(node.target).rpartition(".")[0]] = None
        if node in found and node not in norms:
            continue
        stack += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return [name for name in names if name]


def theirs(architecture: Any, last: list[str]) -> Row:
    """torch-pruning on the eager model; masked by zeroing what its groups name."""
    import torch
    import torch_pruning as tp

    model, inputs = architecture.build(), architecture.inputs()
    inputs = {**inputs, **architecture.constants}
    masked = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    ignored = [modules[name] for name in last if name in modules]
    start = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=ignored, forward_fn=lambda m, x: m(**x),
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
