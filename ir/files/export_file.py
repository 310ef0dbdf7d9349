"""Reads an export archive by itself: scanned graph, memory-mapped weights, no pickle route.

Torch's own reader is not used: it unpickles sample inputs with `weights_only=False` when the safe
way fails, and evaluates strings of the graph (see export_scan). Here the checked JSON goes to
torch's deserializer, with tensors that were mapped from the file.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_name, refuse_repeated
from graphwright.ir.files.entropy import members as coded
from graphwright.ir.files.export_scan import scan_model
from graphwright.ir.files.operators import NAMESPACES
from graphwright.ir.files.pickles import listed, read_content, refuse_absurd, unsafe
from graphwright.ir.files.size_expressions import CALLS
from graphwright.ir.files.zips import Archive, Member

MAX_JSON = 128 << 20
"""Bytes of a member that is parsed: each may become thirty in memory."""

_CONTAINER = ("archive_format", "archive_version", "byteorder")
_FOLDERS = (
    ".data/",
    "extra/",
    "models/",
    "data/weights/",
    "data/constants/",
    "data/sample_inputs/",
)


def read_export(path: Path) -> tuple[ExportedProgram, dict[str, str]]:
    """The program in a `.pt2` file and its extra files (name to text).

    Tied weights come back tied: one Parameter under all its names.

    Raises:
        ModelError: damaged, not what torch writes, or able to run code; says what was found.
    """
    refuse_name(path)
    archive = Archive(path)
    name = _model_name(archive)
    written = _json(archive, f"models/{name}.json")
    model = scan_model(written, str(path))
    _check_operators(model, str(path))
    storage: Any = torch.UntypedStorage.from_file(
        str(path), shared=False, nbytes=path.stat().st_size
    )
    weights = _tensors(archive, storage, "weights", name)
    constants = _tensors(archive, storage, "constants", name)
    examples = _sample_inputs(archive, name)
    program = _deserialize(model, weights, constants, str(path))
    program.example_inputs = examples
    program._guards_code = [str(guard) for guard in written.get("guards_code") or ()]
    extras = {
        member.removeprefix("extra/"): archive.read(member).decode("utf-8", "replace")
        for member in archive.members
        if member.startswith("extra/")
    }
    return program, extras


def has_member(path: Path, name: str) -> bool:
    """Whether the archive has a member `name` (below its top folder)."""
    return name in Archive(path)


def _model_name(archive: Archive) -> str:
    where = str(archive.path)
    odd = [m for m in archive.members if m not in _CONTAINER and not m.startswith(_FOLDERS)]
    if odd:
        raise ModelError(
            "this export archive holds more than a graph and weights",
            where=where,
            fix="Save the model with torch.export.save; compiled libraries are never loaded.",
            details=tuple(listed(odd)),
        )
    names = [
        m.removeprefix("models/").removesuffix(".json")
        for m in archive.members
        if m.startswith("models/") and m.endswith(".json")
    ]
    if len(names) == 1:
        return names[0]
    if "model" in names:
        return "model"
    raise ModelError(f"the archive holds {len(names)} models: {names}", where=where)


def _json(archive: Archive, member: str) -> Any:
    try:
        return json.loads(archive.read(member, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"member {member!r} is not JSON", where=str(archive.path)) from error


def _check_operators(model: dict[str, Any], where: str) -> None:
    """Registers operators by importing the known package of their namespace.

    Raises:
        ModelError: an operator is still not registered; names it.
    """
    missing = set()
    for node in model["graph_module"]["graph"]["nodes"]:
        parts = node["target"].split(".")
        if parts[:2] != ["torch", "ops"] or len(parts) != 5:
            continue
        if not _is_registered(*parts[2:]):
            with suppress(ImportError):
                importlib.import_module(NAMESPACES.get(parts[2]) or "torch")
            if not _is_registered(*parts[2:]):
                missing.add(f"{parts[2]}.{parts[3]}")
    if missing:
        raise ModelError(
            f"the program uses operators that are not registered: {', '.join(sorted(missing))}",
            where=where,
            fix="Import the package that defines them first, or install its newer version.",
        )


def _is_registered(namespace: str, name: str, overload: str) -> bool:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return packet is not None and hasattr(packet, overload)


def _tensors(
    archive: Archive, storage: torch.UntypedStorage, folder: str, name: str
) -> dict[str, torch.Tensor]:
    """Tensors of one payload table, mapped from the file; one object per tied group."""
    legacy = f"data/{folder}/{name}.pt"
    if legacy in archive:
        raise ModelError(
            f"{legacy} is a pickle of an older torch",
            where=str(archive.path),
            fix="Save the model again with torch 2.8 or later.",
        )
    table = _json(archive, f"data/{folder}/{name}_{folder}_config.json")
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    mapped: dict[str, torch.Tensor] = {}
    streams: dict[str, torch.Tensor] = {}
    where = str(archive.path)
    try:
        for key, entry in table["config"].items():
            if entry["use_pickle"] or entry["path_name"].startswith(("custom_obj", "opaque_obj")):
                raise ModelError(
                    f"tensor {key!r} is stored as a pickle, which could run code",
                    where=where,
                    fix="Do not open it unless you trust its maker; --allow-pickle then opens it.",
                )
            member = archive.members.get(f"data/{folder}/{entry['path_name']}")
            if member is None:
                raise ModelError(f"the bytes of tensor {key!r} are missing", where=where)
            if entry["path_name"].startswith(coded.PREFIX):
                out[key] = _decoded(archive, member, entry, streams, f"{where}: tensor {key!r}")
                continue
            tensor = _tensor(storage, member, entry, f"{where}: tensor {key!r}")
            identity = (member.name, tensor.dtype, tensor.shape, tensor.stride(),
                        tensor.storage_offset(), entry["is_param"])  # fmt: skip
            out[key] = mapped[key] = seen.setdefault(identity, tensor)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"the table of {folder} is not what torch.export writes",
            where=where,
            details=(f"{type(error).__name__}: {error}",),
        ) from error
    refuse_repeated(mapped, archive.path)
    return out


def _decoded(
    archive: Archive, member: Member, entry: dict[str, Any], seen: dict[str, torch.Tensor],
    where: str,
) -> torch.Tensor:  # fmt: skip
    """The tensor of a stream, decoded once for all names of a tied one."""
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    meta = entry["tensor_meta"]
    shape = [int(size["as_int"]) for size in meta["sizes"]]
    dtype = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    dense = torch.empty_strided(shape, strides, device="meta").is_contiguous()
    if entry["is_param"] or not dense or int(meta["storage_offset"]["as_int"]):
        raise ModelError("entropy-coded bytes stand for dense codes alone", where=where)
    if member.name not in seen:
        data = archive.read(f"data/weights/{entry['path_name']}", member.size)
        seen[member.name] = coded.read(data, dtype, shape, where)
    if list(seen[member.name].shape) != shape or seen[member.name].dtype != dtype:
        raise ModelError("two names of one tensor have different shapes", where=where)
    return seen[member.name]


def _tensor(
    storage: torch.UntypedStorage, member: Member, entry: dict[str, Any], where: str
) -> torch.Tensor:
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    meta = entry["tensor_meta"]
    dtype = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
    sizes = [int(size["as_int"]) for size in meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    offset = int(meta["storage_offset"]["as_int"])
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    empty = 0 in sizes
    if min([*sizes, *strides, offset], default=0) < 0 or (
        not empty and (last + 1) * dtype.itemsize > member.size
    ):
        raise ModelError(f"shape {tuple(sizes)} does not fit its {member.size} bytes", where=where)
    if not member.stored:
        raise ModelError("its bytes are compressed, which torch never does", where=where)
    if empty:
        tensor = torch.empty_strided(sizes, strides, dtype=dtype)
    else:
        part = storage[member.offset : member.offset + member.size]
        if member.offset % dtype.itemsize:
            part = part.clone()
        tensor = torch.empty(0, dtype=dtype).set_(part, offset, sizes, strides)
    if entry["is_param"]:
        return torch.nn.Parameter(tensor, requires_grad=bool(meta["requires_grad"]))
    return tensor


def _sample_inputs(archive: Archive, name: str) -> Any:
    member = f"data/sample_inputs/{name}.pt"
    if member not in archive or not archive.members[member].size:
        return None
    data = archive.read(member)
    found = unsafe(_globals_in_checkpoint(data, archive.path))
    if found:
        raise ModelError(
            "the sample inputs in this export archive are a pickle that would import and call",
            where=str(archive.path),
            fix="Save it again with `program.example_inputs = None`, or, if you trust its maker, "
            "use --allow-pickle.",
            details=tuple(listed(found)),
        )
    try:
        inputs = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        refuse_repeated(inputs, archive.path)
        return inputs
    except ModelError:
        raise
    except Exception as error:  # torch raises many types here, RuntimeError and KeyError among them
        raise ModelError(
            "the sample inputs in this export archive are damaged", where=str(archive.path)
        ) from error


def _globals_in_checkpoint(data: bytes, path: Path) -> list[str]:
    if not data.startswith(b"PK"):
        # Older than 1.6, or not torch's: torch.export never wrote such a member.
        raise ModelError(
            "the sample inputs in this export archive are a bare pickle, which could run code",
            where=str(path),
            fix="Do not open it unless you trust its maker; --allow-pickle then opens it.",
        )
    inner = Archive(path, data)
    inner.check_reads_alike()
    contents = [read_content(inner.read(name)) for name in inner.members if name.endswith(".pkl")]
    for content in contents:
        refuse_absurd(content, str(path))
    return [name for content in contents for name in content.globals]


def _deserialize(
    model: dict[str, Any],
    weights: dict[str, torch.Tensor],
    constants: dict[str, torch.Tensor],
    where: str,
) -> ExportedProgram:
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    with quiet("torch._export.serde.serialize", "torch.export"), _all_size_functions():
        try:
            serialized = _dict_to_dataclass(schema.ExportedProgram, model)
            return ExportedProgramDeserializer().deserialize(serialized, weights, constants, None)
        except Exception as error:  # the deserializer raises whatever its parts raise
            version = model.get("torch_version", "unknown")
            raise ModelError(
                "torch cannot rebuild the program in this archive",
                where=where,
                fix=f"It was written by torch {version}; this is torch {torch.__version__}.",
                details=(innermost(error),),
            ) from error


@contextmanager
def _all_size_functions() -> Iterator[None]:
    """Torch's reader lacks some functions that its own size expressions are written with."""
    from sympy.functions.elementary.piecewise import ExprCondPair
    from torch._export.serde.serialize import GraphModuleDeserializer
    from torch.utils._sympy import functions

    names = [n for n in CALLS if n.startswith(("OpaqueUnaryFn", "BitwiseFn"))]
    known = {name: getattr(functions, name) for name in names if hasattr(functions, name)}
    parse = GraphModuleDeserializer._parse_sym_expr

    def with_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.sympy_functions.update({**known, "ExprCondPair": ExprCondPair})
        return parse(self, *args, **kwargs)

    GraphModuleDeserializer._parse_sym_expr = with_all  # type: ignore[method-assign]
    try:
        yield
    finally:
        GraphModuleDeserializer._parse_sym_expr = parse  # type: ignore[method-assign]


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Holds back torch's own log lines: what they say is in our error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
