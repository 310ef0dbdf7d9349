"""The operators that a model file may call: those that compute and touch nothing but their result.

They are taken from torch's own registry by their schemas, so that a torch with more operators needs
no new list. Refused are operators whose effect is elsewhere (nothing is returned and no argument
written), those that are given a file's name, and the few whose schema does not show what they do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from typing import Any

NAMESPACES = {
    "aten": "",
    "prim": "",
    "prims": "",
    "quantized": "",
    "graphwright": "graphwright.ir.ops",
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "transformers": "transformers.integrations.moe",
}
"""Namespaces that are admitted, each with the module that registers it."""

_LISTED = {
    "torchvision": re.compile(
        r"(_?cuda_version|nms|(roi_align|roi_pool|ps_roi_align|ps_roi_pool|deform_conv2d)\w*)"
    ),
    "torchaudio": re.compile(r"_lfilter\w*|lfilter\w*|_overdrive\w*|rnnt_loss\w*|forced_align\w*"),
}
"""Namespaces of other packages with operators that open files: only these names of them."""

_QUIET = frozenset(
    {
        "aten::_assert_async", "aten::_assert_scalar", "aten::_assert_tensor_metadata",
        "aten::_linalg_check_errors", "aten::_print", "aten::warn", "aten::set_grad_enabled",
        "aten::sym_constrain_range", "aten::sym_constrain_range_for_size", "prim::Print",
        "prim::RaiseException", "prim::tolist", "prim::TupleUnpack", "prim::BroadcastSizes",
        "aten::format", "aten::percentFormat", "aten::einsum", "aten::has_torch_function",
    }
)  # fmt: skip
"""Admitted although the schema has no result or open arguments: checks, text for the console, and
the switch of gradients, which loading and calling put back."""

_EFFECTS = frozenset(
    {
        "from_file", "save", "load", "seed", "manual_seed", "set_", "set_data", "set", "backward",
        "get_gradients", "record_stream", "pin_memory", "to_here", "owner", "owner_name",
        "local_value", "confirmed_by_owner", "is_owner", "fork", "awaitable", "rpc_async",
        "rpc_sync", "rpc_remote", "dist_backward", "retain_grad",
    }
)  # fmt: skip
"""Refused by name in every namespace: files, generators, other processes, memory of others."""

_UNCHECKED = re.compile(
    r"_(test|foobar|debug|cufft|cudnn_init|copy_from|resize_output|pin_memory|propagate_xla"
    r"|backward|nested_view_from|reshape_alias|sparse_\w+_unsafe|fused_(adam|sgd|adagrad)|amp_)\w*"
)
"""Private operators that trust sizes they are given, or that no model calls."""

_PRIM = re.compile(
    r"(is_\w+|data|device|dtype|grad|requires_grad|layout|itemsize|nbytes|index|type|name|id"
    r"|abs|min|max|NumToTensor|EnumName|EnumValue|TupleIndex|StringIndex|Uninitialized"
    r"|ModuleContainerIndex|IfThenElse|VarConcat|VarStack|rangelist|unchecked_cast"
    r"|unchecked_unwrap_optional|AutogradZero|AutogradAdd|ReductionSizes"
    r"|ConstantChunk|ChunkSizes)"
)
"""Operators of the interpreter itself that compute; the others belong to its optimizer."""

_FILE = re.compile(r"file|path|dir$|url|uri", re.IGNORECASE)


def is_plain(namespace: str, name: str) -> bool:
    """Whether an operator is known to have no effect but its result.

    One that torch has not registered is admitted where its namespace is: it cannot be called.
    """
    if namespace not in NAMESPACES or name in _EFFECTS:
        return False
    listed = _LISTED.get(namespace)
    return listed.fullmatch(name) is not None if listed else name not in refused_names(namespace)


@lru_cache(maxsize=16)
def refused_names(namespace: str) -> frozenset[str]:
    """The registered operators of a namespace that a file may not call."""
    overloads = _registered().get(namespace, {})
    return frozenset(
        name for name, schemas in overloads.items() if not _admits(namespace, name, schemas)
    )


def _admits(namespace: str, name: str, schemas: list[Any]) -> bool:
    if name in _EFFECTS or _UNCHECKED.fullmatch(name):
        return False
    if f"{namespace}::{name}" in _QUIET:
        return True
    if namespace == "prim":
        return _PRIM.fullmatch(name) is not None
    return all(_is_pure(schema) for schema in schemas)


def _is_pure(schema: Any) -> bool:
    """The schema names a result or an argument that is written, and no file."""
    written = False
    for argument in schema.arguments:
        written = written or (argument.alias_info is not None and argument.alias_info.is_write)
        if _FILE.search(argument.name) and str(argument.type).startswith(("str", "Optional[str")):
            return False
    return written or bool(schema.returns)


@lru_cache(maxsize=1)
def _registered() -> dict[str, dict[str, list[Any]]]:
    """Schemas by namespace and name."""
    import torch

    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        found[namespace][name].append(schema)
    return found
