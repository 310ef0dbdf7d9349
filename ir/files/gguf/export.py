"""Writes a program as a GGUF file: layers in codes keep their codes, the rest is floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.modules import block_sums
from graphwright.ir.files.detect import read_json
from graphwright.ir.files.export_checkpoint import other_tensors, owner_of
from graphwright.ir.files.gguf.architectures import ARCHITECTURES, Architecture
from graphwright.ir.files.gguf.described import entries_of
from graphwright.ir.files.gguf.encode import BLOCK, encode_blocks, encode_floats
from graphwright.ir.files.gguf.model import METADATA, model_class
from graphwright.ir.files.gguf.reader import Stored, read_gguf_file
from graphwright.ir.files.gguf.writer import write_gguf_file
from graphwright.ir.files.pickles import listed
from graphwright.ir.graph.constants import constant_nodes, constant_value
from graphwright.ir.ops.blocks import dequantize_blocks, unpack_codes
from graphwright.ir.program import Program
from graphwright.ir.stored.read import form_of

aten = torch.ops.aten

Floats = Literal["f16", "f32", "q8_0"]
FILE = "model.gguf"

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
"""llama.cpp's number for a file by the type of most of its matrices."""

_OF_THE_FILE = ("general.alignment", "general.file_type", "general.quantization_version")
_EXACT = 2**-23
"""A change that is the rounding of float32 and no more."""


def export_gguf(program: Program, folder: Path, like: Path | None, floats: Floats) -> list[str]:
    """Writes `model.gguf` into a folder, which is made.

    Args:
        program: left as it is.
        folder: for the file.
        like: the model's folder, with config.json and the tokenizer; of a model that came from a
            GGUF file it holds that file's metadata, which is copied.
        floats: type of matrices that are in no codes.

    Returns:
        Notes: types written, and what is rounded by how much.

    Raises:
        ModelError: no folder, an architecture or tokenizer that cannot be described, tensors of
            other shapes than the configuration says, or that the model's own code does not use.
    """
    if like is None or not (like / "config.json").is_file():
        raise ModelError("export gguf: the model comes from no folder of transformers and no GGUF "
                         "file, so that its configuration and tokenizer are unknown")  # fmt: skip
    config: Any = read_json(like / "config.json")
    known = (like / METADATA).is_file()
    entries = dict(read_gguf_file(like / METADATA).entries) if known else entries_of(like, config)
    kind = str(entries["general.architecture"])
    weights, notes = _named(program, _shapes(config, like))
    tensors: dict[str, Stored] = {}
    rounded: dict[str, float] = {}
    for name, weight in weights.items():
        ours, weight = _theirs(ARCHITECTURES[kind], name, weight, config)
        tensors[ours], change = _encoded(weight, ours, floats)
        if change > _EXACT:
            rounded[f"{ours} ({tensors[ours].type.name})"] = change
    if rounded:
        worst = max(rounded.values())
        notes.append(f"{len(rounded)} weights are rounded, by {worst:.1e} of their largest number "
                     f"at most: {', '.join(listed(list(rounded), 3))}")  # fmt: skip
    types = Counter(s.type.name for s in tensors.values() if len(s.shape) == 2)
    notes.append("matrices: " + ", ".join(f"{n} {name}" for name, n in sorted(types.items())))
    most = max(types, key=lambda name: types[name], default="F32")
    entries = {key: value for key, value in entries.items() if key not in _OF_THE_FILE}
    entries |= {"general.file_type": _FILE_TYPES[most], "general.quantization_version": 2}
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf_file(folder / FILE, entries, tensors)
    return notes


def _shapes(config: dict[str, Any], like: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by name; those that are tied to another are left out."""
    cls, settings = model_class(config, like)
    with torch.device("meta"):
        blank = cls(settings)
    blank.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}


def _named(
    program: Program, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Blocks | Tensor], list[str]]:
    """The weights by the names of the model's own code, and notes.

    Raises:
        ModelError: some are missing, have other shapes, or are no tensors of the model.
    """
    coded = _coded(program)
    plain, notes = other_tensors(program, {owner.removesuffix(".weight") for owner in coded})
    found: dict[str, Blocks | Tensor] = {**plain, **coded}
    names = {name: _aliases(program, name) for name in found}
    every = [alias for aliases in names.values() for alias in aliases]
    prefix = _prefix(every, shapes)
    weights: dict[str, Blocks | Tensor] = {}
    for name, aliases in names.items():
        own = [alias.removeprefix(prefix) for alias in aliases]
        place = next((alias for alias in own if alias in shapes), None)
        if place is not None:
            weights[place] = found[name]
        elif own[0] == "lm_head.weight":
            weights[own[0]] = found[name]
    _refuse_others(weights, shapes)
    return weights, notes


def _refuse_others(
    weights: Mapping[str, Blocks | Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ModelError(
            f"export gguf: {len(missing)} tensors of the model are not in the program",
            details=tuple(listed(missing, 5)),
        )
    other = []
    for name, weight in weights.items():
        wanted = shapes.get(name)
        shape = tuple(weight.shape)
        if wanted is not None and shape != wanted and shape != wanted[::-1]:
            other.append(f"{name}: {shape}, not {wanted}")
    if other:
        raise ModelError(
            f"export gguf: {len(other)} tensors have other shapes than the configuration says, and "
            "llama.cpp knows no other",
            fix="Leave out passes that cut channels, heads or layers.",
            details=tuple(listed(other, 5)),
        )


def _prefix(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a wrapper has put in front of all names."""
    for name in names:
        for wanted in shapes:
            if name.endswith(wanted):
                return name.removesuffix(wanted)
    return ""


def _aliases(program: Program, owner: str) -> list[str]:
    """All names of a weight: those of its tensor, or of its codes."""
    for suffix in ("", "_codes"):
        names = program.aliases.get(f"{owner}{suffix}")
        if names:
            return [name.removesuffix(suffix) for name in names]
    return [owner]


def _coded(program: Program) -> dict[str, Blocks]:
    """Weights that are blocks of codes and nothing else, by name."""
    found: dict[str, Blocks] = {}
    constants = constant_nodes(program.graph)
    for node in program.graph.nodes:
        if node not in constants or constants.issuperset(node.users):
            continue
        blocks = _blocks(program, _unturned(node))
        if blocks is not None:
            found[owner_of(node)] = blocks
    return found


def _unturned(node: fx.Node) -> fx.Node:
    if node.target is aten.transpose.int and node.meta["val"].dim() == 2:
        assert isinstance(node.args[0], fx.Node)
        return node.args[0]
    return node


def _blocks(program: Program, node: fx.Node) -> Blocks | None:
    """The blocks of a weight; None where it is anything else, or more."""
    if node.op != "call_function" or node.meta["val"].dim() != 2:
        return None
    form = form_of(node)
    if form is None or len(form.parts) != 1 or form.order or form.scale or form.shift:
        return None
    call = form.parts[0][2][0]
    if len(form.parts[0][2]) > 1 or call.target is not dequantize_blocks:
        return None
    arguments: Any = call.args
    codes, scale, zero, bits, block, columns = arguments
    scales = constant_value(program, scale)
    q = unpack_codes(constant_value(program, codes), block, bits).flatten(1)[:, :columns]
    zeros = None
    if zero is not None:
        zeros = unpack_codes(constant_value(program, zero), scales.shape[1], bits)
    rest: Tensor | None = None
    for b, a in form.low_rank:
        sums = constant_value(program, a)
        if rest is not None or not torch.equal(sums.float(), block_sums(block, columns)):
            return None
        rest = constant_value(program, b)
    return Blocks(q, scales, zeros, None, bits, block, rest)


def _theirs(
    architecture: Architecture, name: str, weight: Blocks | Tensor, config: Mapping[str, Any]
) -> tuple[str, Blocks | Tensor]:
    """llama.cpp's name of a weight, and the weight as it stores it."""
    owner, _, part = name.rpartition(".")
    inside = owner.removeprefix(f"{architecture.layers}.")
    if inside == owner:
        leaf = next((ours for ours, theirs in architecture.outer.items() if theirs == owner), None)
        full = leaf
    else:
        number, _, rest = inside.partition(".")
        leaf = next((ours for ours, theirs in architecture.names.items() if theirs == rest), None)
        full = f"blk.{number}.{leaf}"
    if leaf is None or part not in ("weight", "bias"):
        raise ModelError(f"export gguf: llama.cpp has no name for {name!r}")
    if architecture.rotated and leaf in ("attn_q", "attn_k"):
        key = "num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"
        weight = _rows(weight, int(config.get(key) or config["num_attention_heads"]))
    if isinstance(weight, Tensor):
        if architecture.centred and leaf.endswith("norm") and part == "weight":
            weight = weight.float() + 1
        if leaf in architecture.turned and part == "weight":
            weight = weight.t()
    return f"{full}.{part}", weight


def _rows(weight: Blocks | Tensor, heads: int) -> Blocks | Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates them."""
    order = torch.arange(weight.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
    if isinstance(weight, Tensor):
        return weight[order]
    zero = None if weight.zero is None else weight.zero[order]
    rest = None if weight.rest is None else weight.rest[order]
    return Blocks(weight.q[order], weight.scale[order], zero, weight.order, weight.bits,
                  weight.block, rest)  # fmt: skip


def _encoded(weight: Blocks | Tensor, name: str, floats: Floats) -> tuple[Stored, float]:
    """A weight in the type that says it, or in the one for floats, and what it is rounded by."""
    if isinstance(weight, Blocks):
        found = encode_blocks(weight)
        if found is not None:
            return found
        from graphwright.ir.files.coded.layout import Layer
        from graphwright.ir.files.coded.modules import coded_linear

        weight = coded_linear(Layer(weight)).weight
    if weight.dim() != 2 or name.startswith("position_embd"):
        return encode_floats(weight, "F32")
    fits = floats != "q8_0" or weight.shape[1] % BLOCK == 0
    return encode_floats(weight, floats.upper() if fits else "F16")
