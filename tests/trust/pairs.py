"""Every pass behind every other: compiled from one spec, contracts checked, both artifacts equal.

    python tests/trust/pairs.py [--rows decompose.* fuse.*] [--columns ...] [--write]

runs the pairs whose first or second pass is among the rows and whose other one is among the
columns, each on the small net of the first pass or of the second, and writes docs/pairs.md. What
has been run lies in out/pairs.jsonl and is not run again unless the sources changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import torch

HERE = Path(__file__).resolve()
for folder in ("tests/benchmarks", "docs/demo", "tests"):  # as pytest has them
    sys.path.insert(0, str(HERE.parents[2] / folder))

from models import every_pass
from safetensors.torch import save_file
from trust.chains import BACKENDS, Run, beyond_the_declared

from graphwright.ir.errors import GraphwrightError, SpecError
from graphwright.job.pipeline import JobSettings, run
from graphwright.job.rules import check_rules
from graphwright.passes.registry import pass_ids
from graphwright.specs.emit import to_yaml
from graphwright.specs.spec import Spec, parse_spec

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "out" / "pairs.jsonl"
PAGE = ROOT / "docs" / "pairs.md"

STRUCTURAL = ("decompose.*", "reparameterize.*", "fuse.*", "resize.*", "insert.*")
OTHERS = (
    "cleanup.fold_batch_norm", "cleanup.canonicalize", "prune.zig", "prune.magnitude",
    "prune.wanda", "quantize.int8", "quantize.rtn", "quantize.nf4", "quantize.gptq",
    "compensate.eora", "adapt.lora", "adapt.merge", "tune.finetune", "cast.dtype",
    *STRUCTURAL,
)  # fmt: skip
FROM_FILES = ("adapt.load", "resize.resample")

Step = dict[str, dict[str, Any]]
Key = tuple[str, str]

NOTHING = (
    "matches no",
    "no selected layer",
    "nothing to",
    "there is no",
    "finds no",
    "0 global averages",
)
"""Words of messages that say that a net has nothing for a pass."""

WORDS = {
    "ok": "compiled; every contract held; both artifacts are the program",
    "rule": "the check refuses the order, without the model",
    "said": "a pass or a backend refuses, with a message",
    "none": "the small nets have nothing for one of the two",
    "wrong": "wrong, or an error without a message",
}


def passes(patterns: Iterable[str]) -> list[str]:
    """Ids that match a pattern, without those that read a file."""
    names = [name for name in pass_ids() if name not in FROM_FILES]
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def steps_of(first: str, second: str, kind: str) -> list[Step]:
    """The chain of the first pass, and behind it that of the second: each step once.

    On a net that is not its own, a pass has all layers as its targets.
    """
    found: list[Step] = []
    for name in (first, second):
        own, steps = every_pass.chain(name)
        for step, given in steps:
            options = {k: v for k, v in given.items() if own == kind or k != "targets"}
            if {step: options} not in found:
                found.append({step: options})
    return found


def spec_of(kind: str, steps: Sequence[Step], folder: Path) -> Spec:
    """The checked spec.

    Raises:
        SpecError: the check refuses it.
    """
    data = {"data": "data.safetensors", "batch_size": 4}
    plain = json.loads(json.dumps(list(steps)))
    document = {"version": 1, "calibration": data, "training": data, "passes": plain,
                "lower": list(BACKENDS)}  # fmt: skip
    spec = parse_spec(to_yaml(document), folder=folder)
    check_rules(spec)
    return spec


def prepare(kind: str, folder: Path) -> Path:
    """A folder with the net of a kind and data for it."""
    folder = folder / kind
    if not folder.exists():
        folder.mkdir(parents=True)
        every_pass.traced(kind).save(folder / "model.pt2")
        batches = every_pass.batches(kind)
        columns = {
            name: torch.cat([batch[name] for batch in batches])
            for batch in batches[:1]
            for name in batch
        }
        if "ids" in columns:
            columns["labels"] = columns["ids"].clone()
        save_file(columns, folder / "data.safetensors")
    return folder


def judge(first: str, second: str, folder: Path) -> tuple[str, str]:
    """(key of `WORDS`, message) of a pair; the better of its two nets, but for wrong ones."""
    kinds = dict.fromkeys((every_pass.chain(first)[0], every_pass.chain(second)[0]))
    found = [_judge_on(kind, first, second, folder) for kind in kinds]
    if any(word == "wrong" for word, _ in found):
        return next(item for item in found if item[0] == "wrong")
    return min(found, key=lambda item: list(WORDS).index(item[0]))


def _judge_on(kind: str, first: str, second: str, folder: Path) -> tuple[str, str]:
    here = prepare(kind, folder)
    try:
        spec = spec_of(kind, steps_of(first, second, kind), here)
    except SpecError as error:
        return "rule", str(error)
    settings = JobSettings(out=here / "out", quiet=True, resume=False)
    try:
        with mock.patch("graphwright.job.latency.measure_latency", return_value=[]):
            outcome = run(here / "model.pt2", spec, settings)
    except GraphwrightError as error:
        text = str(error)
        if type(error).__name__ == "ContractError":
            return "wrong", f"{kind}: {text}"
        return ("none" if any(word in text for word in NOTHING) else "said"), f"{kind}: {text}"
    except Exception as error:  # a bug of ours, which counts
        return "wrong", f"{kind}: {error!r}"
    done = Run(kind, (first, second), "done", outcome=outcome)
    far = [] if outcome_changed(outcome) else beyond_the_declared(done, here)
    return ("wrong", "; ".join(far)) if far else ("ok", "")


def outcome_changed(outcome: Any) -> bool:
    """Whether the interface is another one, so that the original cannot be run beside it."""
    given = [spec.name for spec in outcome.program.signature.inputs]
    return given not in (["x"], ["ids"])


def pairs(rows: Sequence[str], columns: Sequence[str]) -> Iterator[Key]:
    """Both orders of every row with every column, each once."""
    seen: set[Key] = set()
    for one in rows:
        for other in columns:
            for key in ((one, other), (other, one)):
                if one != other and key not in seen:
                    seen.add(key)
                    yield key


def _page(
    found: dict[Key, tuple[str, str]], rows: list[str], columns: list[str], earlier: int
) -> str:
    marks = {"ok": "+", "rule": "r", "said": "m", "none": ".", "wrong": "**x**"}
    counts = {word: sum(w == word for w, _ in found.values()) for word in WORDS}
    lines = [
        "# Pairs of passes",
        "",
        "Every pass that changes the structure of a network, in front of and behind others, from",
        "one spec: each on the small net of its own tests, contracts checked at every step,",
        "lowered to ONNX Runtime and Triton's backend, and the artifacts held to the program. By",
        "`python tests/trust/pairs.py --write`; a sample of the pairs is a test.",
        f"{len(found)} pairs; {earlier} of them were run on earlier sources, and not again.",
        "",
        *(f"- {marks[word]}: {text} ({counts[word]})" for word, text in WORDS.items()),
        "",
        "In a cell: the row's pass first, then the column's pass first.",
        "",
        "| | " + " | ".join(f"`{name}`" for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for one in rows:
        cells = []
        for other in columns:
            both = [found.get(key, ("", ""))[0] for key in ((one, other), (other, one))]
            cells.append("" if one == other else " ".join(marks.get(word, "?") for word in both))
        lines.append(f"| `{one}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _sources() -> str:
    import hashlib

    found = hashlib.sha256()
    for folder in ("ir", "passes", "backends", "specs", "core"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


def main() -> None:
    """Runs the pairs and prints what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(STRUCTURAL))
    parser.add_argument("--columns", nargs="*", default=list(OTHERS))
    parser.add_argument("--part", default="0/1", help="which of how many parts, as 0/2")
    parser.add_argument("--write", action="store_true", help="write the page")
    parser.add_argument("--earlier", action="store_true", help="run only what never was")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = passes(arguments.rows), passes(arguments.columns)
    version = _sources()
    CACHE.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in CACHE.read_text().splitlines()] if CACHE.exists() else []
    found = {(r["first"], r["second"]): (r["word"], r["said"]) for r in kept
             if r["version"] == version}  # fmt: skip
    done = {(r["first"], r["second"]) for r in kept} if arguments.earlier else set(found)
    number, parts = (int(n) for n in arguments.part.split("/"))
    wanted = [k for i, k in enumerate(pairs(rows, columns)) if i % parts == number]
    with tempfile.TemporaryDirectory() as folder, CACHE.open("a") as out:
        for first, second in wanted:
            if (first, second) in done:
                continue
            word, said = judge(first, second, Path(folder))
            found[first, second] = (word, said)
            row = {"first": first, "second": second, "word": word, "said": said,
                   "version": version}  # fmt: skip
            out.write(json.dumps(row) + "\n")
            out.flush()
            if word == "wrong":
                print(f"{first} -> {second}: {said}", flush=True)
    if arguments.write:
        earlier = {(r["first"], r["second"]): (r["word"], r["said"]) for r in kept} | found
        asked = {key: earlier[key] for key in pairs(rows, columns) if key in earlier}
        PAGE.write_text(_page(asked, rows, columns, sum(key not in found for key in asked)))
    print({word: sum(w == word for w, _ in found.values()) for word in WORDS})


if __name__ == "__main__":
    main()
