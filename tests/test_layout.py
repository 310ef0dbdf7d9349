"""One home per concept: facts about layers, constants, insertion; families apart; no circles."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "core": "graphwright", "ir": "graphwright.ir", "passes": "graphwright.passes",
    "backends": "graphwright.backends", "specs": "graphwright.specs",
}  # fmt: skip

LONGEST = 350
"""Lines of a source file."""

CIRCLE = {
    "graphwright.ir.edit", "graphwright.ir.files.archive", "graphwright.ir.files.exported",
    "graphwright.ir.graph.shapes", "graphwright.ir.mode", "graphwright.ir.program",
}  # fmt: skip
"""The one circle: `program.save`, `program.train` and `program.eval` live on the program."""

KINDS_HOME = ROOT / "ir" / "layers" / "kinds.py"
CONSTANTS_HOME = ROOT / "ir" / "graph" / "constants.py"
CONSTANTS = {"constant_nodes", "constant_value", "constant_operand", "depends_on_input"}
INSERTION_HOME = ROOT / "ir" / "stored"
WEIGHT_OPS = {"dequantize", "dequantize_blocks", "dequantize_table", "dequantize_codebook",
              "expand_2_4", "add_low_rank"}  # fmt: skip


def _name(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join([PACKAGES[folder], *parts])


FILES = {_name(path): path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def found_in(
    rule: Callable[[ast.Module], Iterable[str]],
    but: Iterable[Path],
    folders: Iterable[str] = PACKAGES,
) -> dict[str, list[str]]:
    """What a rule finds in the files of some folders, by module; `but` some files."""
    files = {n: p for n, p in FILES.items() if p.relative_to(ROOT).parts[0] in folders}
    found = {name: list(rule(tree(path))) for name, path in files.items() if path not in but}
    return {name: wrong for name, wrong in found.items() if wrong}


def imports(source: ast.Module, known: set[str]) -> set[str]:
    """Modules that a file imports when it runs, at any depth; not those for types alone."""
    for_types: set[int] = set()
    found: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for_types |= {id(part) for part in ast.walk(node)}
        elif id(node) not in for_types:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {alias: f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in known else str(node.module) for name in full.values()}
    return found & known


# ---- layer facts


def layer_words() -> set[str]:
    from graphwright.ir.layers.kinds import TABLE

    operators = {str(op).removesuffix(".default") for k in TABLE.values() for op in k.operators}
    return set(TABLE) | operators


def is_multiplied(word: str) -> bool:
    """Whether a word names a layer with a matrix or a kernel, not a norm or a table."""
    return "norm" not in word and "embedding" not in word


def _word(node: ast.expr) -> str:
    """`"conv2d"` and `aten.conv2d.default` as the words of the table."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    return text.removeprefix("torch.ops.").removesuffix(".default")


def layer_tables(source: ast.Module, words: set[str]) -> Iterator[str]:
    """Constants of a module that say where operands or axes of layers are, or list their kinds."""
    for node in source.body:
        value = getattr(node, "value", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        if isinstance(value, ast.Dict):
            plain = ast.Constant | ast.UnaryOp | ast.Tuple
            numbers = all(isinstance(v, plain) for v in value.values)
            known = [k for k in value.keys if k is not None and _word(k) in words]
            if known and numbers and len(known) * 2 > len(value.keys):
                yield ast.unparse(node)
        is_list = isinstance(value, ast.Tuple | ast.List | ast.Set) and len(value.elts) > 1
        found = [_word(element) for element in value.elts] if is_list else []
        if found and all(word in words and is_multiplied(word) for word in found):
            yield ast.unparse(node)


def test_facts_about_layers_have_one_home() -> None:
    words = layer_words()
    assert found_in(lambda source: layer_tables(source, words), but=(KINDS_HOME,)) == {}


@pytest.mark.parametrize(
    "source",
    [
        'OUTPUT_AXIS = {"matmul": 1, "addmm": 1}',
        'NO_KERNEL = ("conv_transpose1d", "conv_transpose2d")',
        "CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.padding}",
        "PLACE: dict[Any, int] = {aten.addmm.default: 2}",
    ],
)
def test_a_second_table_is_seen(source: str) -> None:
    assert list(layer_tables(ast.parse(source), layer_words()))


# ---- constants


def own_constants(source: ast.Module) -> Iterator[str]:
    """Functions that tell constants of a graph without the one analysis."""
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef) and "constant" in node.name:
            text = ast.unparse(node)
            walks = "all_input_nodes" in text or ".graph.nodes" in text
            if walks and not any(name in text for name in CONSTANTS):
                yield node.name


def test_constants_have_one_home() -> None:
    assert found_in(own_constants, but=(CONSTANTS_HOME,)) == {}


def test_a_second_analysis_is_seen() -> None:
    copy = "def _is_constant(node):\n    return all(map(_is_constant, node.all_input_nodes))"
    assert list(own_constants(ast.parse(copy))) == ["_is_constant"]


# ---- insertion of stored weights


def own_insertions(source: ast.Module) -> Iterator[str]:
    """Calls of an editor that put an op in which rebuilds a weight."""
    for node in ast.walk(source):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "call" and ast.unparse(node.func.value) not in ("place", "self.place"):
            target = ast.unparse(node.args[0]).removesuffix(".default") if node.args else ""
            if target.rpartition(".")[2] in WEIGHT_OPS:
                yield ast.unparse(node)


def test_weights_are_inserted_in_one_place() -> None:
    home = [path for path in FILES.values() if INSERTION_HOME in path.parents]
    assert found_in(own_insertions, but=home, folders=("passes", "ir")) == {}


def test_a_second_insertion_is_seen() -> None:
    copy = "editor.call(torch.ops.graphwright.dequantize.default, codes, scale, before=node)"
    assert list(own_insertions(ast.parse(copy)))


# ---- the import graph


def test_no_family_imports_another_ones_private_files() -> None:
    wrong = []
    for name, path in FILES.items():
        for module in imports(tree(path), set(FILES)):
            parts = module.split(".")
            is_private = module.startswith("graphwright.passes.") and any(
                part.startswith("_") for part in parts[3:]
            )
            if is_private and name.split(".")[:3] != parts[:3] and name != "graphwright":
                wrong.append(f"{name} imports {module}")
    assert wrong == []


def test_there_is_one_circle() -> None:
    graph = nx.DiGraph()
    for name, path in FILES.items():
        graph.add_edges_from((name, module) for module in imports(tree(path), set(FILES)))
    circles = [found for found in nx.strongly_connected_components(graph) if len(found) > 1]
    assert all(circle <= CIRCLE for circle in circles), circles


def test_files_are_short() -> None:
    lines = {name: path.read_bytes().count(b"\n") for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
