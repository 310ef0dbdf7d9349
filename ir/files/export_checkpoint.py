"""Writing a program's weights back as a checkpoint, quantized linear layers in codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.layout import Layer
from graphwright.ir.files.coded.modules import coded_linear
from graphwright.ir.files.coded.written import Written, awq, compressed_tensors, gptq
from graphwright.ir.files.pickles import listed
from graphwright.ir.files.safetensor_files import read_safetensors
from graphwright.ir.graph.constants import constant_nodes, constant_value
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops.blocks import unpack_codes
from graphwright.ir.program import Program

aten = torch.ops.aten
ours = torch.ops.graphwright

Format = Literal["gptq", "awq", "compressed-tensors", "safetensors"]

_NO_CODES = "the program has no linear layer in codes to write"

WRITERS: dict[str, Callable[[Written], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}


BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "generation_config.json", "*processor_config.json",
)  # fmt: skip
"""Files that belong to a model and not to its weights: other loaders ask for them."""


def export_checkpoint(
    program: Program, folder: str | Path, format: Format = "gptq", *, like: str | Path | None = None
) -> list[str]:
    """Writes `model.safetensors` and `config.json`, as GPTQ, AWQ or compressed-tensors tools do.

    Linear layers in `graphwright::dequantize_blocks` are written in codes, or, in the format
    safetensors, as the floats they stand for; weights that are rebuilt in another way, such as
    embedding tables, as floats too; all else as it is. Linear layers that stay in float are named
    in the description, so that other loaders leave them alone. Tensors have the names of the model
    that the program was traced from.

    Args:
        program: left as it is.
        folder: made when it is not there.
        format: of the codes, or `safetensors` for none.
        like: folder of the model, whose other entries of `config.json` are taken over, and its
            files of the tokenizer and of generation.

    Returns:
        Notes: what was written as floats though it is quantized, and a config.json left out.

    Raises:
        ModelError: no layer is quantized so, layers differ in bits or block, the format cannot
            hold them, or a pass has put in tensors that the model's own code would not use.
    """
    from safetensors.torch import save_file

    if format not in get_args(Format):
        raise ModelError(f"no checkpoint format {format!r}",
                         fix=f"One of {', '.join(get_args(Format))}.")  # fmt: skip
    coded = _coded_layers(program)
    if format == "safetensors":
        tensors, description = _as_floats(coded), None
    else:
        tensors, description = WRITERS[format](_written(program, coded))
    plain, notes = other_tensors(program, set(coded))
    tensors |= plain
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
    shapes |= {f"{owner}.weight": form.shape for owner, form in coded.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    config = _config_of(like, plain)
    if description is not None:
        config["quantization_config"] = description
    reshaped = _reshaped(shapes, like)
    if reshaped:
        notes.append(f"{len(reshaped)} tensors have other shapes than the model's config.json "
                     f"describes ({', '.join(listed(reshaped, 3))}): correct its entries, which "
                     "are taken over as they are")  # fmt: skip
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if like is not None:
        _copy_beside(Path(like), folder)
    return notes


def refuse_without_codes(program: Program, format: Format, passes: Iterable[str]) -> None:
    """Says before the passes run that a format in codes will find none to write.

    Args:
        program: as it is traced.
        format: that is asked for.
        passes: ids of the passes that are going to run.

    Raises:
        ModelError: no linear layer is in codes, and no pass of the family quantize comes.
    """
    if format == "safetensors" or _coded_layers(program):
        return
    if not any(name.startswith("quantize.") for name in passes):
        raise ModelError(
            f"export {format}: {_NO_CODES}, and no pass of the chain makes codes",
            fix="Put quantize.rtn or quantize.gptq before it, or export safetensors.",
        )


def _written(program: Program, coded: Mapping[str, Blocks]) -> Written:
    """The linear layers in codes, and the names of the others.

    Raises:
        ModelError: there are none in codes, or they differ in bits or block.
    """
    if not coded:
        raise ModelError(_NO_CODES)
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


def other_tensors(program: Program, coded: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """All but some weights in codes, under its own name, and what is floats though it is in codes.

    Args:
        program: left as it is.
        coded: owners of the weights that are left out, as `owner_of` says without `.weight`.

    Raises:
        ModelError: a pass has put in tensors that the model's own code would not use.
    """
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    constants = constant_nodes(program.graph)
    rebuilt: set[str] = set()
    for node in program.graph.nodes:
        if node not in constants or constants.issuperset(node.users):
            continue
        parts, is_ours = _under(node)
        if not is_ours:
            continue
        rebuilt |= parts
        owner = owner_of(node)
        if owner.removesuffix(".weight") not in coded:
            tensors[owner] = constant_value(program, node)
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
    rounded = sum("fake_quantize" in str(node.target) for node in program.graph.nodes)
    if rounded:
        notes.append(f"the rounding of {rounded} activations is not written")
    return tensors, notes


def _under(node: fx.Node) -> tuple[set[str], bool]:
    """Names of the stored tensors that a node is computed from, and whether by an op of ours."""
    stack, found, is_ours = [node], set(), False
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            found.add(str(current.target))
        is_ours |= getattr(current.target, "namespace", "") == ours.name
        stack.extend(current.all_input_nodes)
    return found, is_ours


def owner_of(node: fx.Node) -> str:
    """The name of a weight from those of its parts: fc.weight of fc.weight_codes and its scale.

    Parts that other weights are computed from too do not count, where it has some of its own.
    """
    parts, _ = _under(node)
    own = {part for part in parts if _is_own(node, part)}
    parts = own or parts
    first, last = min(parts), max(parts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    shared = first[:same]
    if shared in parts and len(parts) > 1:
        return shared
    return shared[: max(shared.rfind("_"), shared.rfind("."))]


def _is_own(weight: fx.Node, part: str) -> bool:
    """Whether one call alone reads a stored part of a weight."""
    stored = next(n for n in weight.graph.find_nodes(op="get_attr") if n.target == part)
    return len(stored.users) == 1


def _as_floats(coded: Mapping[str, Blocks]) -> dict[str, Tensor]:
    """The weights of linear layers in codes, inputs in the model's own order."""
    return {f"{owner}.weight": coded_linear(Layer(form)).weight for owner, form in coded.items()}


def _config_of(like: str | Path | None, plain: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a folder, with the dtype of the tensors that are written."""
    if like is None:
        return {}
    found: dict[str, Any] = json.loads((Path(like) / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "compression_config", "torch_dtype"):
        found.pop(key, None)
    dtype = next((t.dtype for t in plain.values() if t.is_floating_point()), None)
    return found if dtype is None else {**found, "dtype": str(dtype).removeprefix("torch.")}


def _reshaped(shapes: Mapping[str, tuple[int, ...]], like: str | Path | None) -> list[str]:
    """Names of tensors that have another shape in the model's own folder."""
    if like is None:
        return []
    found = []
    for file in sorted(Path(like).glob("*.safetensors")):
        for name, tensor in read_safetensors(file).items():
            if name in shapes and shapes[name] != tuple(tensor.shape):
                found.append(name)
    return found


def _copy_beside(source: Path, folder: Path) -> None:
    """Copies what belongs to the model and not to its weights."""
    for pattern in BESIDE:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
