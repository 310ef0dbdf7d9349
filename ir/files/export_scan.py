"""Checks the graph of an export archive before torch sees it; drops what a program does not need.

`torch.export.load` evaluates size expressions, executes guards, resolves operators by attribute
look-up from `torch`, and pastes names into the Python source of the graph. So every string that
goes one of these ways must match a grammar here. Nothing is executed by the scan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from graphwright.ir.errors import ModelError
from graphwright.ir.files.operators import is_plain
from graphwright.ir.files.size_expressions import (
    LARGEST_SIZE,
    defined,
    has_size_for_power,
    is_plain_expression,
    is_plain_guard,
)

HIGHER_ORDER = frozenset(
    {
        "cond", "while_loop", "map_impl", "scan", "associative_scan", "autograd_function_apply",
        "wrap_with_set_grad_enabled", "wrap_with_autocast", "flex_attention", "invoke_subgraph",
        "wrap", "checkpoint", "tag_activation_checkpoint", "auto_functionalized",
        "auto_functionalized_v2",
    }
)  # fmt: skip

PYTHON_OPS = frozenset(
    f"_operator.{name}"
    for name in (
        "getitem", "add", "mul", "sub", "truediv", "floordiv", "mod", "pow", "neg", "abs",
        "ge", "le", "gt", "lt", "eq", "ne", "and_", "or_", "not_", "lshift", "rshift",
    )
) | {"math.ceil", "math.floor", "math.trunc"}  # fmt: skip

TORCH_FUNCTIONS = re.compile(r"torch\.(sym_(int|float|ite|max|min|not|sqrt|sum)|_sym_sqrt)")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_QUALIFIED = re.compile(r"[\w.:/@\-]*")
_TREE_TYPES = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)
KEPT_METADATA = frozenset({"nn_module_stack", "custom"})


def scan_model(model: Any, where: str) -> dict[str, Any]:
    """The archive's `model.json` with guards and stray metadata dropped, every string checked.

    Args:
        model: the JSON value of `models/<name>.json`.
        where: file, for messages.

    Raises:
        ModelError: it could run code, or is not what torch writes; lists what was found.
    """
    try:
        found = [*_problems(model), *_powers(model)]
        if not found:
            return _reduced(model)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ModelError(
            "the graph in the archive is not what torch.export writes",
            where=where,
            details=(f"{type(error).__name__}: {error}",),
        ) from error
    raise ModelError(
        "this export archive could run code when it is opened",
        where=where,
        fix="Do not open it unless you trust its maker; --allow-pickle then opens it.",
        details=tuple(found[:8]),
    )


def _problems(model: dict[str, Any]) -> Iterator[str]:
    graph_module = model["graph_module"]
    for guard in model.get("guards_code") or []:
        if not is_plain_guard(str(guard)):
            yield f"guard: {_short(guard)}"
    yield from _in_value(graph_module["graph"])
    yield from _in_value(graph_module["signature"])
    for name in model.get("range_constraints") or {}:
        if not _IDENTIFIER.fullmatch(name) and not is_plain_expression(name):
            yield f"size symbol: {_short(name)}"
    for entry in graph_module.get("module_call_graph") or []:
        if not _QUALIFIED.fullmatch(entry["fqn"]):
            yield f"module name: {_short(entry['fqn'])}"
        if entry.get("signature"):
            yield from _in_call(entry["signature"])


def _powers(model: dict[str, Any]) -> Iterator[str]:
    """Sizes that are exponents, where some size of the file is large."""
    texts: list[str] = []
    hints: list[int] = []
    pending: list[Any] = [model["graph_module"]]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("expr_str"), str):
                texts.append(value["expr_str"])
                hints += [h for h in (value.get("hint") or {}).values() if isinstance(h, int)]
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    powers = [text for text in dict.fromkeys(texts) if has_size_for_power(text)]
    if powers and max(hints, default=0) > LARGEST_SIZE:
        yield f"size expression: {_short(powers[0])} of sizes up to {max(hints)}"


def _in_call(signature: dict[str, Any]) -> Iterator[str]:
    for name in signature.get("forward_arg_names") or []:
        if not _IDENTIFIER.fullmatch(name):
            yield f"argument name: {_short(name)}"
    for key in ("in_spec", "out_spec"):
        _, tree = json.loads(signature[key])
        yield from _in_tree(tree)
    yield from _in_value([signature["inputs"], signature["outputs"]])


def _in_tree(tree: dict[str, Any]) -> Iterator[str]:
    """Output trees: a context may hold keys of a dict, never a class or a module to import."""
    kind, context = tree["type"], tree["context"]
    if kind is not None:
        keys = json.loads(context) if isinstance(context, str) else context
        plain = keys is None or (isinstance(keys, list) and all(_is_plain_key(key) for key in keys))
        if kind in _TREE_TYPES:
            if not plain:
                yield f"container context: {_short(context)}"
        elif not _QUALIFIED.fullmatch(kind) or "defaultdict" in kind or "__enum__" in str(context):
            yield f"container {_short(kind)} with context {_short(context)}"
    for child in tree["children_spec"]:
        yield from _in_tree(child)


def _is_plain_key(key: object) -> bool:
    if isinstance(key, str):
        return _QUALIFIED.fullmatch(key) is not None
    return isinstance(key, int)


def _in_value(value: Any, key: str = "") -> Iterator[str]:
    """Walks graph and signature; the key a string stands under says which grammar it must match."""
    if isinstance(value, dict):
        for name, part in value.items():
            if key in ("tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values"):
                yield from _identifier(name)
            if name == "metadata":
                continue  # reduced to plain strings below, never looked up
            if name in ("custom_obj", "as_custom_obj", "custom_obj_values") and part:
                yield "a torch-bind object among the inputs or constants"
            yield from _in_value(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _in_value(part, key)
    elif isinstance(value, str):
        yield from _in_string(value, key)


def _in_string(value: str, key: str) -> Iterator[str]:
    if key in ("name", "as_name"):
        yield from _identifier(value)
    elif key in ("target", "as_operator"):
        if not is_plain_operator(value):
            yield f"operator: {_short(value)}"
    elif key == "expr_str":
        if not is_plain_expression(value):
            yield f"size expression: {_short(value)}"
    elif key.endswith("_name") and not _QUALIFIED.fullmatch(value):
        yield f"tensor name: {_short(value)}"


def _identifier(name: str) -> Iterator[str]:
    if name and not _IDENTIFIER.fullmatch(name):
        yield f"node name: {_short(name)}"


def is_plain_operator(target: str) -> bool:
    """Whether a call target is an operator known to have no effect but its result."""
    if target in PYTHON_OPS or TORCH_FUNCTIONS.fullmatch(target):
        return True
    parts = target.split(".")
    if parts[:2] != ["torch", "ops"] or not all(_IDENTIFIER.fullmatch(p) for p in parts):
        return False
    if len(parts) == 4 and parts[2] == "higher_order":
        return parts[3] in HIGHER_ORDER
    return len(parts) in (4, 5) and is_plain(parts[2], parts[3])


def _reduced(model: dict[str, Any]) -> dict[str, Any]:
    """The model without guards (read apart, never executed) and without metadata torch resolves."""
    model = {**model, "guards_code": []}
    _define_functions(model["graph_module"])
    for graph in _graphs(model["graph_module"]["graph"]):
        for node in graph["nodes"]:
            kept = {k: v for k, v in (node.get("metadata") or {}).items() if k in KEPT_METADATA}
            node["metadata"] = kept
    return model


def _define_functions(value: Any) -> None:
    """Size expressions get torch's functions back where they were saved as unknown ones."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key == "expr_str":
                value[key] = defined(part)
            else:
                _define_functions(part)
    elif isinstance(value, list):
        for part in value:
            _define_functions(part)


def _graphs(value: Any) -> Iterator[dict[str, Any]]:
    """The graph and the graphs nested in its calls."""
    if isinstance(value, dict):
        if "nodes" in value and "tensor_values" in value:
            yield value
        for part in value.values():
            yield from _graphs(part)
    elif isinstance(value, list):
        for part in value:
            yield from _graphs(part)


def _short(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= 100 else text[:97] + "...")
