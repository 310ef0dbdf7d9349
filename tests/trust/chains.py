"""Chains of passes drawn at random among those that the check of a spec lets pass."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from trust.nets import NETS

import graphwright as gw
from graphwright.ir.errors import GraphwrightError, SpecError
from graphwright.job.pipeline import JobSettings, run
from graphwright.job.rules import check_rules
from graphwright.specs.emit import to_yaml
from graphwright.specs.schema import shipped_schema
from graphwright.specs.spec import Spec, parse_spec

TRAINED = {"tune": {"steps": 2, "batch_size": 4}}
QUICK: dict[str, dict[str, Any]] = {
    "tune.finetune": TRAINED, "prune.issp": TRAINED,
    "prune.nm": {**TRAINED, "method": "sr_ste"},
    "prune.otov2": TRAINED | {"tune": {"steps": 12, "batch_size": 4}},
    "quantize.pv": TRAINED, "quantize.vptq": {"centroids": 16, "kmeans_iterations": 5},
    "quantize.adaquant": {"iterations": 5}, "prune.mfac": {"steps": 2, "gradients": 4},
    "quantize.bit_allocation": {"options": {"iterations": 5}},
}  # fmt: skip
"""Options that make the slow passes quick; the others run with their defaults."""

SLACK = 1.5
"""Errors of passes and lowering add up, with quantizers' codes that fall to the other side."""

BACKENDS = ("onnxruntime", "triton")


@dataclass(frozen=True)
class Run:
    """A chain on a net and what came of it.

    Attributes:
        net: name of the net. chain: ids of its passes.
        ended: `done`, or the class of the error. said: its message.
        outcome: the job's, where it ended well.
    """

    net: str
    chain: tuple[str, ...]
    ended: str
    said: str = ""
    outcome: Any = None


def spec_of(chain: tuple[str, ...], folder: Path, lower: tuple[str, ...] = BACKENDS) -> Spec:
    """The checked spec of a chain, with data in `folder`/data.npz.

    Raises:
        SpecError: the check refuses it.
    """
    data = {"data": "data.npz", "batch_size": 4}
    passes = [{name: QUICK[name]} if name in QUICK else name for name in chain]
    document = {"version": 1, "calibration": data, "training": data, "passes": passes,
                "lower": list(lower)}  # fmt: skip
    spec = parse_spec(to_yaml(document), folder=folder)
    check_rules(spec)
    return spec


def draw_chains(seed: int, longest: int = 4) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(net, chain) without end, of one to `longest` different passes, in any order."""
    generator = random.Random(seed)
    names = shipped_schema().names("pass")
    while True:
        length = generator.randint(1, longest)
        yield generator.choice(list(NETS)), tuple(generator.sample(names, length))


def legal(chain: tuple[str, ...], folder: Path) -> bool:
    """Whether the check of a spec lets the chain pass."""
    try:
        spec_of(chain, folder)
    except SpecError:
        return False
    return True


def run_chain(net: str, chain: tuple[str, ...], folder: Path, lower: tuple[str, ...]) -> Run:
    """Compiles a net, whose files lie in `folder`, by a chain; nothing is timed."""
    settings = JobSettings(out=folder / "out", quiet=True, resume=False)
    try:
        spec = spec_of(chain, folder, lower)
        with mock.patch("graphwright.job.latency.measure_latency", return_value=[]):
            outcome = run(folder / "model.pt2", spec, settings)
    except GraphwrightError as error:
        return Run(net, chain, type(error).__name__, str(error))
    except Exception as error:  # a bug of ours, which counts
        return Run(net, chain, "bug", repr(error))
    return Run(net, chain, "done", outcome=outcome)


def beyond_the_declared(run: Run, folder: Path) -> list[str]:
    """Artifacts that are further from the original than passes and lowering say together."""
    original = gw.load(folder / "model.pt2")
    inputs = original.examples
    expected = original.run_flat(inputs)
    lost = gw.compare(expected, run.outcome.program.run_flat(inputs)).relative
    found = []
    for name, compiled in run.outcome.compiled.items():
        error = gw.compare(expected, compiled.run_flat(inputs)).relative
        said = compiled.notes.get("products", {}).get("outputs", 0.0)
        if not error <= SLACK * (lost + said) + 1e-4:
            found.append(f"{name}: {error:.3g}, passes lose {lost:.3g}, lowering says {said:.3g}")
    return found


def prepare(net: str, folder: Path) -> Path:
    """Writes the net's program and data into a folder of their own, once."""
    folder = folder / net
    if not folder.exists():
        folder.mkdir(parents=True)
        program = NETS[net].program()
        program.save(folder / "model.pt2")
        NETS[net].write_data(folder / "data.npz", program)
    return folder
