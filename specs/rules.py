"""Rules between fields that a JSON schema cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from graphwright.specs.document import CHAINS, Node, Path, show
from graphwright.specs.entries import chain_nodes, entry_id
from graphwright.specs.meant import yaml_text
from graphwright.specs.schema import Schema
from graphwright.specs.selector import excludes_only, pattern_faults
from graphwright.specs.translate import Finding


def rule_findings(root: Node, schema: Schema, sound: Callable[..., bool]) -> Iterator[Finding]:
    """Findings about fields that are each valid by themselves.

    Args:
        root: the document, misspelt names already taken for what they mean.
        schema: what is valid.
        sound: whether nothing at a place is wrong in an unclear way; nothing is concluded there.
    """
    document = root.plain()

    if sound("model", "kwargs") and sound("model", "factory"):
        yield from _factory(document.get("model"))
    yield from _inputs(document.get("model"), sound)
    if sound("passes") and sound("lower") and sound("model", "dtype"):
        yield from _dtype(document, root, schema)
    for section in ("calibration", "training"):
        if sound(section):
            yield from _source(
                section, document.get(section), schema.defaults("CalibrationSection")
            )
    if sound("require") and sound("evaluate"):
        yield from _drop_without_metric(document)
    if sound("export"):
        yield from _folders(root)
    if sound("passes") and sound("lower") and sound("export"):
        yield from _nothing_to_do(document)
    for index, node in enumerate(chain_nodes(root, "passes")):
        if sound("passes", index):
            yield from _selectors(node, index, schema)
            yield from _data(document, node, index, schema, sound)


def _factory(model: Any) -> Iterator[Finding]:
    if isinstance(model, dict) and model.get("kwargs") and not model.get("factory"):
        message = "kwargs are for a factory, and there is none"
        yield Finding(("model", "kwargs"), message, at_key=True)


def _inputs(model: Any, sound: Callable[..., bool]) -> Iterator[Finding]:
    inputs = model.get("inputs") if isinstance(model, dict) else None
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in (inputs if isinstance(inputs, dict) else {}).items():
        path: Path = ("model", "inputs", name)
        if not sound(*path):
            continue
        yield from _scalar(path, tensor)
        low_high = tensor.get("range")
        is_pinned = tensor.get("shape") == [] and low_high and low_high[0] == low_high[1]
        if low_high and low_high[0] >= low_high[1] and not is_pinned:
            swapped = yaml_text(low_high[::-1]) if low_high[0] > low_high[1] else ""
            message = f"expected [low, high) with low < high, got {yaml_text(low_high)}"
            yield Finding((*path, "range"), message, swapped)
        if tensor.get("example") is not None and tensor.get("shape") is not None:
            yield from _example(path, tensor["shape"], tensor["example"], sizes)


def _source(section: str, given: Any, defaults: dict[str, Any]) -> Iterator[Finding]:
    """Samples are read or made; options of how they are made are for those."""
    if not isinstance(given, dict):
        return
    for key, message in _source_faults(section, given, defaults):
        yield Finding((section, key) if key else (section,), message, at_key=True)


def _source_faults(
    section: str, given: dict[str, Any], defaults: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it); no key where the section as a whole is meant."""
    source, method = given.get("source"), given.get("filter")
    if given.get("data") is None and source is None:
        yield "", f"'{section}' needs 'data', or 'source: bn_synthesis'"
    elif given.get("data") is None and source == "domain_shift":
        yield "source", "domain_shift needs 'data', images of the domain it starts from"
    if method and source is None:
        yield "filter", "filter is for images that are made, by a 'source'"
    elif method in _BESIDE_DATA and source != "bn_synthesis":
        yield "filter", f"{method} is for 'source: bn_synthesis'"
    elif method in _BESIDE_DATA and given.get("data") is None:
        yield "filter", f"{method} needs 'data', real images to compare with"
    for key, owner, is_owned in (
        ("synthesis", "source: bn_synthesis", source == "bn_synthesis"),
        ("shift", "source: domain_shift", source == "domain_shift"),
        ("threshold", "filter: agreement", method == "agreement"),
        ("keep", "filter: bidirectional", method == "bidirectional"),
    ):
        if given.get(key, defaults.get(key)) != defaults.get(key) and not is_owned:
            yield key, f"{key} is for '{owner}'"


_BESIDE_DATA = ("metropolis_hastings", "bidirectional")


def _scalar(path: Path, tensor: dict[str, Any]) -> Iterator[Finding]:
    """A tensor has a dtype and a shape; a pinned scalar may have both, of no dimension."""
    absent = [key for key in ("dtype", "shape") if tensor.get(key) is None]
    if tensor.get("value") is None:
        for key in absent:
            yield Finding(path, f"'{'.'.join(map(str, path))}' needs {show(key)}", at_key=True)
        return
    if len(absent) == 1:
        message = f"a pinned tensor needs {show(absent[0])} too; a plain number has neither"
        yield Finding(path, message, at_key=True)
    if tensor.get("shape"):
        yield Finding((*path, "shape"), "only a scalar can be pinned by 'value'", "[]")
    for key in ("range", "example"):
        if tensor.get(key) is not None:
            yield Finding((*path, key), f"'value' leaves nothing to {key}", at_key=True)


def _example(
    path: Path, shape: list[int | str], example: list[int], sizes: dict[str, tuple[int, str]]
) -> Iterator[Finding]:
    """An example must be a shape that the input can have."""
    if len(shape) != len(example):
        message = f"expected one size per dimension of shape {yaml_text(shape)}"
        message += f", got {yaml_text(example)}"
        yield Finding((*path, "example"), message)
        return
    for axis, (dim, size) in enumerate(zip(shape, example, strict=True)):
        place = (*path, "example", axis)
        if isinstance(dim, int):
            if dim != size:
                message = f"size {size} does not fit shape {yaml_text(shape)}"
                yield Finding(place, message, str(dim))
            continue
        if size < 2:
            message = f"dimension {show(dim)} must be traced with 2 or more, or its size is fixed"
            yield Finding(place, message, "2")
        first, owner = sizes.setdefault(dim, (size, str(path[-1])))
        if first != size:
            message = f"dimension {show(dim)} is {size} here and {first} in input {show(owner)}"
            yield Finding(place, message, str(first))


def _dtype(document: dict[str, Any], root: Node, schema: Schema) -> Iterator[Finding]:
    """The dtype that is asked for has to run in every pass and backend."""
    model = document.get("model")
    asked = model.get("dtype") if isinstance(model, dict) else None
    chains = [[entry_id(n) for n in chain_nodes(root, key)] for key in ("passes", "lower")]
    if asked and (why := dtype_fault(schema, asked, *chains)):
        yield Finding(("model", "dtype"), why, "float32")


def dtype_fault(schema: Schema, dtype: str, passes: list[str], backends: list[str]) -> str:
    """Why a program of a chain cannot be in a floating-point dtype; empty where it can."""
    for said, names in (("does not run", backends), ("does not take", passes)):
        for name in names:
            if name in schema.definitions and dtype not in schema.computes_in(name):
                return f"{name} {said} {dtype}"
    return ""


def _drop_without_metric(document: dict[str, Any]) -> Iterator[Finding]:
    bounds = document.get("require") or {}
    if "max_drop" in bounds and "evaluate" not in document:
        message = "max_drop bounds the loss of a metric, and there is no 'evaluate' section"
        yield Finding(("require", "max_drop"), message, at_key=True)
    section = document.get("evaluate")
    metric = section.get("metric") if isinstance(section, dict) else None
    if "perplexity_ratio" in bounds and metric != "perplexity":
        message = "perplexity_ratio needs `evaluate: {metric: perplexity}`"
        yield Finding(("require", "perplexity_ratio"), message, at_key=True)


def _nothing_to_do(document: dict[str, Any]) -> Iterator[Finding]:
    if not any(document.get(section) for section in (*CHAINS, "parts")):
        message = "neither 'passes' nor 'lower' nor 'export' has an entry: there is nothing to do"
        yield Finding((), message)


def _folders(root: Node) -> Iterator[Finding]:
    """Two checkpoints cannot be written into one folder."""
    taken: dict[str, int] = {}
    for index, node in enumerate(chain_nodes(root, "export")):
        name = entry_id(node)
        options = node.plain()[name] if node.entries else None
        folder = str((options or {}).get("folder") or name)
        first = taken.setdefault(folder.lower(), index)
        if first != index:
            message = f"the folder {show(folder)} is that of export[{first}]; give it another one"
            yield Finding(("export", index), f"{message}: {{folder: {name}-{index}}}")


def _data(
    document: dict[str, Any],
    node: Node,
    index: int,
    schema: Schema,
    sound: Callable[..., bool],
) -> Iterator[Finding]:
    """A pass that looks at data needs the section that names it."""
    name = entry_id(node)
    facts = schema.facts(name)
    if facts is None:
        return
    options = {} if not node.entries else node.entries[0].node.plain() or {}
    needed = facts.needed(options, schema.defaults(name))
    section = "training" if needed == "training" else "calibration"
    if needed == "nothing" or section in document or not sound(section):
        return
    message = f"{name} needs data, and there is no '{section}' section"
    remedy = f"add one, such as '{section}: {{data: samples.npz}}'"
    yield Finding(("passes", index), f"{message}; {remedy}")


def _selectors(node: Node, index: int, schema: Schema) -> Iterator[Finding]:
    name = entry_id(node)
    for entry in (node.entries[0].node.entries or ()) if node.entries else ():
        patterns = entry.node.plain()
        option = schema.options(name).get(entry.name, {})
        if not is_selector(entry.name, option):
            continue
        path: Path = ("passes", index, name, entry.name)
        if not patterns and option.get("default") != []:
            yield Finding(path, "an empty list selects nothing", "['*']")
        elif excludes_only(patterns):
            message = "only exclusions; say first what is selected"
            yield Finding(path, message, yaml_text(["*", *patterns]))
        for position, fault, suggestion in pattern_faults(patterns, schema.kinds):
            yield Finding((*path, position), fault, suggestion)


def is_selector(name: str, option: dict[str, Any]) -> bool:
    """Whether an option of a pass is a list of layer patterns."""
    marked = option.get("x-graphwright", {}).get("selector") is True
    return marked or (name == "targets" and option.get("type") == "array")
