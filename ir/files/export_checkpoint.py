"""Writing a program's weights back as a checkpoint, quantized linear layers in codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.written import Written, awq, compressed_tensors, gptq
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops.blocks import unpack_codes
from graphwright.ir.program import Program

aten = torch.ops.aten
ours = torch.ops.graphwright

Format = Literal["gptq", "awq", "compressed-tensors"]

WRITERS: dict[str, Callable[[Written], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}


def export_checkpoint(
    program: Program, folder: str | Path, format: Format = "gptq", *, like: str | Path | None = None
) -> list[str]:
    """Writes `model.safetensors` and `config.json`, as GPTQ, AWQ or compressed-tensors tools do.

    Linear layers in `graphwright::dequantize_blocks` are written in codes; weights that are
    rebuilt in another way, such as embedding tables, as the floats they stand for; all else as it
    is. Linear layers that stay in float are named in the description, so that other loaders leave
    them alone. Tensors have the names of the model that the program was traced from.

    Args:
        program: left as it is.
        folder: made when it is not there.
        format: of the codes.
        like: folder of the model, whose other entries of `config.json` are taken over.

    Returns:
        Notes: what was written as floats though it is quantized.

    Raises:
        ModelError: no layer is quantized so, layers differ in bits or block, the format cannot
            hold them, or a pass has put in tensors that the model's own code would not use.
    """
    from safetensors.torch import save_file

    if format not in WRITERS:
        raise ModelError(f"no checkpoint format {format!r}",
                         fix=f"One of {', '.join(get_args(Format))}.")  # fmt: skip
    written = _written(program)
    tensors, description = WRITERS[format](written)
    plain, notes = _other_tensors(program, set(written.layers))
    tensors |= plain
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    config = {**_config_of(like), "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def _written(program: Program) -> Written:
    """The linear layers in codes, and the names of the others.

    Raises:
        ModelError: there are none in codes, or they differ in bits or block.
    """
    coded = _coded_layers(program)
    if not coded:
        raise ModelError("the program has no linear layer in codes to write")
    grids = {(form.bits, form.block) for form in coded.values()}
    if len(grids) > 1:
        raise ModelError(
            "layers differ in bits or block, and a checkpoint has one of each",
            details=tuple(sorted(f"{bits} bits, block {block}" for bits, block in grids)),
        )
    names = [name for layer in layers(program, MATRICES) for name in layer.names]
    return Written(coded, [name for name in dict.fromkeys(names) if name not in coded])


def _coded_layers(program: Program) -> dict[str, Blocks]:
    """Weights in blocks that linear layers alone read, by module name."""
    found: dict[str, Blocks] = {}
    for node in program.graph.find_nodes(op="call_function", target=ours.dequantize_blocks.default):
        users = list(node.users)
        if all(u.target is aten.linear.default and u.args[1] is node for u in users):
            found[_owner(node)] = _coded(program, node, users)
    return found


def _owner(node: fx.Node) -> str:
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    return str(codes.target).removesuffix("_codes").removesuffix(".weight")


def _coded(program: Program, node: fx.Node, users: list[fx.Node]) -> Blocks:
    codes, scale, zero, bits, block, columns = node.args
    assert isinstance(bits, int)
    assert isinstance(block, int)
    stored = [None if n is None else constant_value(program, n) for n in (codes, scale, zero)]  # type: ignore[arg-type]
    packed, scales, zeros = stored
    assert packed is not None
    assert scales is not None
    q = unpack_codes(packed, block, bits).flatten(1)[:, :columns]
    middle = None if zeros is None else unpack_codes(zeros, scales.shape[1], bits)
    orders = [_order(program, user) for user in users]
    return Blocks(q.contiguous(), scales, middle, orders[0], bits, block)


def _order(program: Program, linear: fx.Node) -> Tensor | None:
    """The stored order that a layer's inputs are brought in; None where there is none."""
    x = linear.args[0]
    if not isinstance(x, fx.Node) or x.target is not aten.index_select.default:
        return None
    index = x.args[2]
    if not isinstance(index, fx.Node) or not str(index.target).endswith("weight_order"):
        return None
    return program.state[str(index.target)]


def _other_tensors(program: Program, coded: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """All that is no linear layer in codes, under its own name."""
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    rebuilt: set[str] = set()
    for node in program.graph.nodes:
        is_op = getattr(node.target, "namespace", "") == "graphwright"
        if node.op == "call_function" and is_op and not _reads_input(node):
            parts = [n for n in node.all_input_nodes if n.op == "get_attr"]
            rebuilt |= {str(part.target) for part in parts}
            owner = str(parts[0].target).rpartition("_")[0]
            if owner.removesuffix(".weight") not in coded:
                tensors[owner] = _as_stored(program, node)
                notes.append(f"{owner} is written as floats")
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in rebuilt or name.endswith("weight_order"):
            continue
        if gw_meta(node).get("by"):
            raise ModelError(
                f"the model's own code has no use for {name!r}, which {gw_meta(node)['by']} put in",
                fix="Use insert_scales: false, or save the program itself.",
            )
        tensors[name] = program.state[name]
    return tensors, notes


def _as_stored(program: Program, node: fx.Node) -> Tensor:
    """A rebuilt weight in the shape that the layer reads."""
    value = constant_value(program, node)
    for user in node.users:
        if user.target in (aten.reshape.default, aten.transpose.int):
            return constant_value(program, user)
    return value


def _reads_input(node: fx.Node) -> bool:
    return any(n.op != "get_attr" for n in node.all_input_nodes)


def _config_of(like: str | Path | None) -> dict[str, Any]:
    if like is None:
        return {}
    found = json.loads((Path(like) / "config.json").read_text(encoding="utf-8"))
    return dict(found)
