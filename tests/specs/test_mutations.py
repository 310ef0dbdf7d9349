"""Single-typo mutants of the ready-made specs: all refused, in place, with the right suggestion."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs import load_spec, parse_spec, ready_made_specs, resolve, shipped_schema
from graphwright.specs.document import Node
from graphwright.specs.emit import to_yaml
from graphwright.specs.load import read_text

SEED = 20240
COUNT = 300
SECTIONS = [
    "model.inputs={ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 99]}}",
    "calibration={data: synthetic, samples: 128, batch_size: 8}",
    "evaluate={data: synthetic, metric: cosine, samples: 64}",
    "require={max_drop: 0.002, min_speedup: 1.2, max_file_mb: 30, max_rss_gb: 4, max_minutes: 20, "
    "integer_kernels: all}",
]
SELECTORS = {"quantize.int8": "targets", "cast.dtype": "keep"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Mutant:
    """A spec with one slip: where it is, and what stood there before ("" when nothing is right)."""

    kind: str
    text: str
    line: int
    column: int
    right: str


def written_out(name: str) -> str:
    """A ready-made spec with every section and every option in it."""
    spec = load_spec(name, SECTIONS)
    document = resolve(spec)
    for entry in document["passes"]:
        for pass_id in entry if isinstance(entry, dict) else ():
            if pass_id in SELECTORS:
                entry[pass_id][SELECTORS[pass_id]] = ["kind:linear", "!*.layer[0-9].head"]
    return to_yaml(document)


def typo(rng: random.Random, word: str) -> str:
    """One slip of the fingers: a letter dropped, doubled, swapped or replaced, or the usual mixes
    of case, dash and underscore, singular and plural."""
    places = [i for i, c in enumerate(word) if c.isalnum()]
    i = rng.choice(places)
    slips = [
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[:i] + rng.choice(LETTERS) + word[i + 1 :],
        word.capitalize(),
        word.upper(),
        word + "s" if not word.endswith("s") else word[:-1],
    ]
    if i + 1 < len(word):
        slips.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    if "_" in word:
        slips += [word.replace("_", "-"), word.replace("_", "", 1)]
    return rng.choice(slips)


class Sites:
    """The places of a spec that can be mistyped, by kind."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found: dict[str, list[tuple[int, int, str]]] = {
            kind: [] for kind in ("key", "id", "option", "enum", "type", "unit", "selector")
        }
        self.ids = {*shipped_schema().names("pass"), *shipped_schema().names("backend")}
        root, _ = read_text(text, "s")
        self._walk(root, ())

    def _walk(self, node: Node, path: tuple[str | int, ...]) -> None:
        for index, item in enumerate(node.items or ()):
            self._walk(item, (*path, index))
        for entry in node.entries or ():
            inside = path[:1] in (("passes",), ("lower",))
            kind = "id" if entry.written in self.ids else "option" if inside else "key"
            if path != ("model", "inputs"):
                self.found[kind].append((entry.line, entry.column, entry.written))
            if path == ("require",) and entry.written != "integer_kernels":  # a count, no unit
                self.found["unit"].append((entry.line, entry.column, entry.written))
            self._walk(entry.node, (*path, entry.written))
        if node.items is None and node.entries is None:
            self._scalar(node, path)

    def _scalar(self, node: Node, path: tuple[str | int, ...]) -> None:
        value = node.value
        place = (node.line, node.column)
        if isinstance(value, str) and value in self.ids:
            self.found["id"].append((*place, value))
        elif path[-1] in ("dtype", "metric", "activations", "to", "activation_range"):
            self.found["enum"].append((*place, str(value)))
        elif len(path) > 1 and path[-2] in SELECTORS.values():
            self.found["selector"].append((*place, f'"{value}"'))
        elif isinstance(value, bool | int | float):
            written = self.token(*place)
            self.found["type"].append((*place, written))
            if path[0] == "require":
                self.found["unit"].append((*place, written))

    def token(self, line: int, column: int) -> str:
        found = re.match(r'"[^"]*"|[\w.+-]+', self.text.splitlines()[line - 1][column - 1 :])
        assert found
        return found[0]

    def replace(self, line: int, column: int, old: str, new: str) -> str:
        lines = self.text.splitlines(keepends=True)
        row = lines[line - 1]
        assert row[column - 1 :].startswith(old), (row, column, old)
        lines[line - 1] = row[: column - 1] + new + row[column - 1 + len(old) :]
        return "".join(lines)


def slip(rng: random.Random, kind: str, word: str) -> tuple[str, str]:
    """(what is written, what is right) for a token of this kind."""
    if kind == "type":
        if word in ("true", "false"):
            forms = {"true": ["yes", "on", "1", '"true"'], "false": ["no", "off", "0", '"false"']}
            return rng.choice(forms[word]), word
        as_integer = [f"{word}.0"] if word.isdecimal() else []
        return rng.choice([f'"{word}"', f"[{word}]", *as_integer]), word
    if kind == "unit":
        if word[0].isdigit():
            return f"{word}{rng.choice(['MB', 'GB', ' min', 'x', '%', 'h'])}", ""
        other = {"mb": "gb", "gb": "mb", "minutes": "hours", "speedup": "speed", "drop": "loss"}
        stem, _, unit = word.rpartition("_")
        return f"{stem}_{other[unit]}", word
    if kind == "selector":
        return slipped_selector(rng, word)
    return typo(rng, word), word


def slipped_selector(rng: random.Random, word: str) -> tuple[str, str]:
    if "kind:" in word:
        kind = typo(rng, "linear")
        choices = [(f'"kind:{kind}"', "kind:linear"), (f'"{typo(rng, "kind")}:linear"',) * 2]
        written, right = rng.choice(choices)
        return written, "kind:linear" if right else ""
    faulty = [("[", ""), ("]", ""), (".", ".."), ("*", "* "), (".", "/"), ('"!', '"!!')]
    old, new = rng.choice(faulty)
    return word.replace(old, new, 1), "" if old in "[]" else word.strip('"')


def mutants() -> list[Mutant]:
    rng = random.Random(SEED)
    texts = [written_out(name) for name in ready_made_specs()]
    found: dict[str, Mutant] = {}
    kinds = ("key", "id", "option", "enum", "type", "unit", "selector")
    while len(found) < COUNT:
        kind = kinds[len(found) % len(kinds)]
        sites = Sites(rng.choice(texts))
        if not sites.found[kind]:
            continue
        line, column, word = rng.choice(sites.found[kind])
        written, right = slip(rng, kind, word)
        if is_valid_anyway(kind, written, word, sites.text, line):
            continue
        text = sites.replace(line, column, word, written)
        found[text] = Mutant(kind, text, line, column, right)
    return list(found.values())


def is_valid_anyway(kind: str, written: str, word: str, text: str, line: int) -> bool:
    """Whether the slip gives something that is right in that place: no error can be asked for."""
    if written == word:
        return True
    if kind in ("key", "option", "id", "unit") and not written[0].isdigit():
        return bool(re.search(rf"(^|[\s{{,]){re.escape(written)}:", text)) or not written
    if kind == "type":  # [8] is right where a list of sizes stands; 30.0 is a fine number
        row = text.splitlines()[line - 1]
        numeric = "range:" in row or row.lstrip().startswith("require")
        return (written.endswith(".0") and numeric) or f"[{word}" in row or f", {word}]" in row
    return written == "linear"


MUTANTS = mutants()


@cache
def problems_of(text: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name="spec.yaml")
    return caught.value.problems


def test_mutants_are_of_every_kind():
    counts = Counter(mutant.kind for mutant in MUTANTS)
    assert len(MUTANTS) == COUNT
    assert len(counts) == 7
    assert min(counts.values()) >= COUNT // 7


def test_specs_without_a_typo_are_accepted():
    for name in ready_made_specs():
        assert load_spec(name).passes
        assert parse_spec(written_out(name)).evaluate is not None


def test_every_mutant_is_refused_in_its_place_with_one_problem():
    for mutant in MUTANTS:
        problems = problems_of(mutant.text)
        shown = (mutant.kind, [str(problem) for problem in problems])
        assert {p.line for p in problems} == {mutant.line}, shown
        assert mutant.column in {p.column for p in problems}, shown
        assert len(problems) == 1, shown


def test_the_first_suggestion_is_right():
    answerable = [mutant for mutant in MUTANTS if mutant.right]
    wrong = []
    for mutant in answerable:
        first = problems_of(mutant.text)[0]
        if first.suggestion != mutant.right:
            wrong.append((str(first), mutant.right))
    assert len(answerable) >= 230
    assert len(wrong) <= 0.02 * len(answerable), wrong


def test_all_errors_come_at_once():
    rng = random.Random(SEED)
    for name in ready_made_specs():
        sites = Sites(written_out(name))
        places = []
        for kind in ("key", "id", "option", "type"):
            line, column, word = rng.choice(sites.found[kind] or sites.found["key"])
            written, _ = slip(rng, kind, word) if kind == "type" else (f"{word[:-1]}z", word)
            if not any(place[0] == line for place in places):
                places.append((line, column, word, written))
        for place in sorted(places, reverse=True):
            sites.text = sites.replace(*place[:2], place[2], place[3])
        lines = {problem.line for problem in problems_of(sites.text)}
        assert {place[0] for place in places} <= lines


def test_no_model_library_is_imported_to_refuse_them(tmp_path):
    for index, mutant in enumerate(MUTANTS[::15]):
        (tmp_path / f"{index}.yaml").write_text(mutant.text)
    script = (
        "import sys, pathlib\n"
        "from graphwright.ir.errors import SpecError\n"
        "from graphwright.specs import load_spec\n"
        "refused = 0\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.yaml'):\n"
        "    try:\n"
        "        load_spec(path)\n"
        "    except SpecError:\n"
        "        refused += 1\n"
        "heavy = {'torch', 'numpy', 'networkx', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "print(refused, sorted(heavy))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split(maxsplit=1) == [str(len(MUTANTS[::15])), "[]\n"]
