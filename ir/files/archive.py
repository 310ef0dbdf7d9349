"""One `.pt2` file per program: torch's own loader opens it, ours loses nothing.

The file is an export archive (graph as JSON, weights as raw aligned bytes, nothing pickled) with
two extra texts: `graphwright.json` (signature, state order, node records, aliases, provenance,
facts) and `examples.b64` (example inputs as base64 of safetensors). Its bytes depend on the
program alone: no paths, times or file names are in it. Behind `store.entropy` codes are streams
that only ours reads (`entropy/`); torch's refuses the file, for they are shorter than its tensors.
"""

from __future__ import annotations

import base64
import json
import operator
import re
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphwright.ir.atomic import replacing
from graphwright.ir.causes import innermost
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.bounds import bounded
from graphwright.ir.files.entropy.members import PREFIX, Coding
from graphwright.ir.files.export_file import read_export
from graphwright.ir.files.exported import from_exported_program, to_exported_program
from graphwright.ir.files.size_calls import restore, spell
from graphwright.ir.files.size_expressions import CALLS
from graphwright.ir.graph.arrange import arranged
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.lack import cannot_write
from graphwright.ir.program import Program, Provenance
from graphwright.ir.signature import Signature

FORMAT = 1
RECORD = "graphwright.json"
EXAMPLES = "examples.b64"
_CONSTANT = re.compile(r"Integer\(\d+\)")
MIN_MAX = frozenset({"Min", "Max"})
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def save_program(program: Program, path: str | Path) -> None:
    """Writes the program to `path`, whole or not at all.

    Tensors are written from where they are, one at a time: no second copy of the model is made,
    except of tensors that are views of a larger storage (copied one by one) or not on the CPU.
    Behind `store.entropy` each tensor of codes is coded as it is written.

    Raises:
        ArgumentError: a call that torch's format does not know, a tensor of a kind that cannot be
            saved (sparse, quantized, a subclass), a record that is not JSON, or a path that
            cannot be written.
    """
    path = Path(path)
    program = arranged(program)
    exported = to_exported_program(program)
    sizes = spell(exported.graph)
    if any(tensor.device.type != "cpu" for tensor in program.state.values()):
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, "cpu")
    exported.example_inputs = None  # kept as an extra text: torch would pickle them
    extras = {RECORD: _record(program, sizes), EXAMPLES: _examples_text(program.examples)}
    try:
        with replacing(path) as file:
            _write(file, exported, extras, Coding.of(program.facts))
    except OSError as error:
        raise cannot_write("the program", path, error) from error


@bounded
def load_program(path: str | Path) -> Program:
    """The program in a file written by `save_program`; weights stay mapped from the file.

    Raises:
        ModelError: not such a file, damaged, able to run code, or of a newer format.
    """
    path = Path(path)
    exported, extras = read_export(path)
    if RECORD not in extras:
        raise ModelError("this export archive was not written by Graphwright", where=str(path))
    return program_from(exported, extras, str(path))


def program_from(exported: ExportedProgram, extras: dict[str, str], where: str) -> Program:
    """The program of an archive that `read_export` has opened."""
    try:
        record = json.loads(extras[RECORD])
        if record["format"] > FORMAT:
            raise ModelError(
                "this program was saved by a newer Graphwright",
                where=where,
                fix="Install the newer version to open it.",
            )
        signature = Signature.from_json(record["signature"])
        graph, tensors = from_exported_program(exported)
        restore(graph, record.get("sizes", {}))
        _restore_nodes(graph, record["nodes"])
        _name_inputs(graph, signature)
        program = Program(
            graph=graph,
            state={name: tensors[name] for name in record["state"]},
            signature=signature,
            examples=_examples(extras[EXAMPLES], len(signature.inputs)),
            aliases={name: tuple(others) for name, others in record["aliases"].items()},
            provenance=tuple(Provenance(**entry) for entry in record["provenance"]),
            facts=record["facts"],
        )
        return arranged(program)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            "the record of this program is damaged",
            where=where,
            details=(f"{type(error).__name__}: {error}",),
        ) from error


def _record(program: Program, sizes: dict[str, Any]) -> str:
    nodes = {}
    for node in program.graph.nodes:
        entry: dict[str, Any] = {}
        if gw_meta(node):
            entry["gw"] = gw_meta(node)
        # Torch stores the module scope of calls only, and gives getitem nodes their producer's.
        stack = node.meta.get("nn_module_stack")
        if stack and (node.op != "call_function" or node.target is operator.getitem):
            entry["stack"] = {key: list(value) for key, value in stack.items()}
        if entry:
            nodes[node.name] = entry
    record = {
        "format": FORMAT,
        "signature": program.signature.to_json(),
        "state": list(program.state),
        "aliases": {name: list(names) for name, names in program.aliases.items()},
        "provenance": [asdict(entry) for entry in program.provenance],
        "facts": dict(program.facts),
        "nodes": nodes,
        "sizes": sizes,
    }
    try:
        return json.dumps(record, sort_keys=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"the program's record is not JSON: {error}") from error


def _restore_nodes(graph: fx.Graph, nodes: dict[str, Any]) -> None:
    for node in graph.nodes:
        entry = nodes.get(node.name, {})
        node.meta.pop("custom", None)
        if node.op != "output":
            node.meta["custom"] = {"gw": entry.get("gw", {})}
        if node.op != "call_function" or node.target is operator.getitem:
            node.meta.pop("nn_module_stack", None)
        if "stack" in entry:
            node.meta["nn_module_stack"] = {k: tuple(v) for k, v in entry["stack"].items()}


def _name_inputs(graph: fx.Graph, signature: Signature) -> None:
    """Placeholders get the input's own name as target; node names were restored already."""
    placeholders = graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, signature.inputs, strict=True):
        if not _IDENTIFIER.fullmatch(spec.name):
            raise ValueError(f"input name {spec.name!r}")
        node.target = spec.name


def _examples_text(examples: tuple[torch.Tensor, ...]) -> str:
    from safetensors.torch import save

    tensors = {str(i): t.detach().cpu().contiguous() for i, t in enumerate(examples)}
    return base64.b64encode(save(tensors)).decode("ascii")


def _examples(text: str, count: int) -> tuple[torch.Tensor, ...]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(base64.b64decode(text, validate=True))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return tuple(tensors[str(i)] for i in range(count))


def _write(
    file: IO[bytes], exported: ExportedProgram, extras: dict[str, str], coding: Coding | None
) -> None:
    """The archive layout of `torch.export.save`, weights written without a copy in memory."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    for node in exported.graph.nodes:
        node.meta.pop("custom", None)  # in our own record, for every kind of node
    with PT2ArchiveWriter(file) as writer:
        config = _write_weights(writer, exported, coding)
        writer.write_string("data/weights/model_weights_config.json", json.dumps(config))
        writer.write_string("data/constants/model_constants_config.json", '{"config": {}}')
        writer.write_bytes("models/model.json", _graph_json(exported))
        writer.write_bytes("data/sample_inputs/model.pt", b"")
        for name, text in extras.items():
            writer.write_string(f"extra/{name}", text)


def _graph_json(exported: ExportedProgram) -> bytes:
    """The graph as `torch.export.save` writes it, less what does not survive a load: storage
    offsets, gradient flags and symbolic constants of recorded values, and guards (the signature
    is checked instead).

    Torch's `serialize` does the same and then canonicalizes a deep copy as a self-test, which is
    two thirds of its time.
    """
    from torch._export.serde import serialize as serde
    from torch._export.serde.schema import SCHEMA_VERSION, SchemaVersion

    graphs = serde.GraphModuleSerializer(exported.graph_signature, exported.module_call_graph)
    try:
        graph_module = graphs.serialize(exported.graph_module)
    except serde.SerializeError as error:
        raise ArgumentError(
            f"the program cannot be written: {str(error).splitlines()[0]}: {innermost(error)}",
            fix="Torch's file format has no form of this call; write it another way in the model.",
        ) from error
    program = serde.ExportedProgram(  # type: ignore[attr-defined]
        graph_module=graph_module,
        opset_version={"aten": torch._C._get_max_operator_version()},
        range_constraints=serde.serialize_range_constraints(exported.range_constraints),
        schema_version=SchemaVersion(*SCHEMA_VERSION),
        verifiers=[verifier.dialect for verifier in exported.verifiers],
        torch_version=torch.__version__,
        guards_code=[],
    )
    value = serde._dataclass_to_dict(program)
    for meta in value["graph_module"]["graph"]["tensor_values"].values():
        meta["storage_offset"] = {"as_int": 0}
        meta["requires_grad"] = False  # which tensors are trained is in the table of weights
        for key in ("sizes", "strides"):
            meta[key] = [_plain_size(size) for size in meta[key]]
    return json.dumps(value, cls=serde.EnumEncoder, allow_nan=False).encode()


def _plain_size(size: dict[str, Any]) -> dict[str, Any]:
    """A size as it will read after a load: where a symbolic size is always one number, that."""
    if "as_expr" not in size:
        return size
    simple = _simplified(size["as_expr"]["expr_str"])
    if isinstance(simple, int):
        return {"as_int": simple}
    return {"as_expr": {**size["as_expr"], "expr_str": simple}}


@lru_cache(maxsize=4096)
def _simplified(expression: str) -> int | str:
    """Parsed once, as torch does on loading: sympy's Min and Max know that sizes are positive."""
    import sympy
    from torch.utils._sympy import functions

    if not any(f"{name}(" in expression for name in MIN_MAX):
        return int(expression[8:-1]) if _CONSTANT.fullmatch(expression) else expression
    known = {name: getattr(functions, name) for name in CALLS - MIN_MAX if hasattr(functions, name)}
    parsed = sympy.sympify(expression, locals=known)
    return int(parsed) if parsed.is_Integer else str(sympy.srepr(parsed))


def _write_weights(writer: Any, exported: ExportedProgram, coding: Coding | None) -> dict[str, Any]:
    from torch._export.serde.serialize import _dataclass_to_dict, serialize_tensor_meta

    entries: dict[str, Any] = {}
    members: dict[int, str] = {}
    for name, tensor in exported.state_dict.items():
        compact = _compact(name, tensor)
        member = members.get(id(tensor))
        if member is None:
            member = members[id(tensor)] = _write_tensor(writer, len(members), compact, coding)
        meta = _dataclass_to_dict(serialize_tensor_meta(compact))
        meta["requires_grad"] = tensor.requires_grad
        entries[name] = {
            "path_name": member,
            "is_param": isinstance(tensor, torch.nn.Parameter),
            "use_pickle": False,
            "tensor_meta": meta,
        }
    return {"config": entries}


def _write_tensor(writer: Any, index: int, compact: torch.Tensor, coding: Coding | None) -> str:
    """The name of the member that now holds the tensor, as it is or as a stream."""
    stream = coding.stream(compact) if coding else None
    if stream is not None:
        writer.write_bytes(f"data/weights/{PREFIX}{index}", stream)
        return f"{PREFIX}{index}"
    storage = compact.untyped_storage()
    nbytes = storage.nbytes() if compact.numel() else 0
    writer.archive_file.write_record(f"data/weights/weight_{index}", storage, nbytes)
    return f"weight_{index}"


def _compact(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor over a storage that holds its bytes and no others; strides kept where dense."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain or tensor.layout != torch.strided or tensor.is_quantized:
        raise ArgumentError(
            f"tensor {name!r} is a {type(tensor).__name__} ({tensor.layout}): cannot be saved",
            fix="Convert it to a plain dense tensor first.",
        )
    data = tensor.detach().resolve_conj().resolve_neg()
    whole = data.storage_offset() == 0 and data.untyped_storage().nbytes() == data.nbytes
    return data if whole else data.clone()
