"""Checkpoints whose linear layers are stored in codes: read as they are, never as floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks
from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded_layouts import (
    PARTS,
    Coded,
    read_awq,
    read_compressed_tensors,
    read_gptq,
)
from graphwright.ir.files.detect import read_json
from graphwright.ir.files.pickles import listed
from graphwright.ir.files.weights import fill
from graphwright.ir.ops.blocks import pack_codes

ours = torch.ops.graphwright


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint's configuration says of its codes.

    Attributes:
        format: a key of `PARTS`.
        bits: of a code.
        block: inputs of a group; -1 for all.
        offset: what stored zero points are less by (gptq).
    """

    format: str
    bits: int
    block: int
    offset: int = 0

    def read(self, parts: Mapping[str, Tensor]) -> Coded:
        """One layer."""
        if self.format == "gptq":
            return read_gptq(parts, self.bits, self.block, offset=self.offset)
        read = read_awq if self.format == "awq" else read_compressed_tensors
        return read(parts, self.bits, self.block)


def scheme_of(config: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a `quantization_config`.

    Raises:
        ModelError: another method, or a form of it that is not read.
    """
    method = str(config.get("quant_method", config.get("quantization_method", "")))
    if method == "gptq":
        if config.get("dynamic"):
            raise ModelError("GPTQ checkpoints with bits by layer are not read", where=where)
        version = config.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise ModelError(f"GPTQ checkpoints in the form {version!r} are not read", where=where)
        offset = 1 if version == "gptq" else 0
        return Scheme("gptq", int(config["bits"]), int(config.get("group_size", 128)), offset)
    if method == "awq":
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ModelError(f"AWQ checkpoints in the form {version!r} are not read", where=where,
                             fix="Save the checkpoint in the version gemm.")  # fmt: skip
        bits = config.get("bits", config.get("w_bit", 4))
        block = config.get("group_size", config.get("q_group_size", 128))
        return Scheme("awq", int(bits), int(block))
    if method == "compressed-tensors":
        return _compressed_tensors(config, where)
    raise ModelError(
        f"the folder's weights are quantized by {method!r}, which is not read",
        where=where,
        fix="gptq, awq and compressed-tensors (pack-quantized) are.",
    )


def _compressed_tensors(config: Mapping[str, Any], where: str) -> Scheme:
    groups = list((config.get("config_groups") or {}).values())
    if config.get("format") != "pack-quantized" or len(groups) != 1:
        raise ModelError(
            f"compressed-tensors checkpoints in the form {config.get('format')!r} with "
            f"{len(groups)} groups of layers are not read",
            where=where,
            fix="Save it as pack-quantized, with one scheme for all layers.",
        )
    weights = groups[0].get("weights") or {}
    if groups[0].get("input_activations") or weights.get("type") != "int":
        raise ModelError("only integer weights without quantized activations are read", where=where)
    strategy = weights.get("strategy", "group")
    if strategy not in ("group", "channel"):
        raise ModelError(f"the strategy {strategy!r} is not read", where=where)
    block = int(weights.get("group_size") or -1) if strategy == "group" else -1
    return Scheme("compressed-tensors", int(weights["num_bits"]), block)


def is_coded(names: Any) -> bool:
    """Whether tensor names are those of a checkpoint in codes."""
    return any(name.endswith((".qweight", ".weight_packed")) for name in names)


def config_beside(path: Path) -> dict[str, Any]:
    """The `quantization_config` in the folder of a file of weights.

    Raises:
        ModelError: there is none.
    """
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None),
                      ("quant_config.json", None)):  # fmt: skip
        file = path.parent / name
        if file.is_file():
            found: Any = read_json(file)
            found = found.get(key) if key and isinstance(found, dict) else found
            if isinstance(found, dict):
                method = "awq" if name == "quant_config.json" else "gptq"
                return {"quant_method": method, **found}
    raise ModelError(
        "the file holds quantized weights, and nothing beside it says how they are stored",
        where=str(path),
        fix="Put the checkpoint's config.json in the same folder.",
    )


def split(
    tensors: Mapping[str, Tensor], scheme: Scheme, where: str
) -> tuple[dict[str, Tensor], dict[str, Coded]]:
    """The plain tensors, and the layers in codes by the name of their module.

    Raises:
        ModelError: a layer's tensors are incomplete or do not fit each other.
    """
    names = PARTS[scheme.format]
    owners = [n.removesuffix(f".{names[0]}") for n in tensors if n.endswith(f".{names[0]}")]
    plain, coded = dict(tensors), {}
    for owner in owners:
        parts = {p: plain.pop(f"{owner}.{p}") for p in names if f"{owner}.{p}" in tensors}
        try:
            coded[owner] = scheme.read(parts)
        except (KeyError, RuntimeError, IndexError) as error:
            raise ModelError(
                f"the quantized tensors of {owner!r} are incomplete or do not fit each other",
                where=where,
                details=(str(error).splitlines()[0],),
            ) from error
        _check(owner, coded[owner], where)
    return plain, coded


def _check(owner: str, coded: Coded, where: str) -> None:
    out, inputs = coded.q.shape
    wanted = (out, -(-inputs // coded.block))
    shapes = [tuple(t.shape) for t in (coded.scale, coded.zero) if t is not None]
    if any(shape != wanted for shape in shapes):
        raise ModelError(
            f"the scales of {owner!r} are {shapes[0]}, and its {inputs} inputs in groups of "
            f"{coded.block} ask for {wanted}",
            where=where,
        )


class CodedLinear(nn.Module):
    """A linear layer whose weight is codes, rebuilt as the layer runs.

    Its trace is what the passes of `quantize` make of a linear layer.
    """

    weight_order: Tensor | None

    def __init__(self, coded: Coded, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        out, inputs = coded.q.shape
        blocks = coded.scale.shape[1]
        q = nn.functional.pad(coded.q, (0, blocks * coded.block - inputs))
        packed = pack_codes(q.unflatten(1, (blocks, coded.block)), coded.bits)
        self.register_buffer("weight_codes", packed)
        self.register_buffer("weight_scale", coded.scale.to(dtype).contiguous())
        zero = None if coded.zero is None else pack_codes(coded.zero, coded.bits)
        self.register_buffer("weight_zero_point", zero)
        self.register_buffer("weight_order", coded.order)
        self.bias = bias
        self.bits, self.block = coded.bits, coded.block
        self.in_features, self.out_features = inputs, out

    def rebuilt(self) -> Tensor:
        """(out, in), the inputs in `weight_order` where there is one."""
        weight: Tensor = ours.dequantize_blocks(
            self.weight_codes, self.weight_scale, self.weight_zero_point, self.bits, self.block,
            self.in_features,
        )  # fmt: skip
        return weight

    @property
    def weight(self) -> Tensor:
        """(out, in), for models that look at it."""
        if self.weight_order is None:
            return self.rebuilt()
        return self.rebuilt()[:, torch.argsort(self.weight_order)]

    def forward(self, x: Tensor) -> Tensor:
        """Inputs are brought in the order of the codes' columns, which keeps groups together."""
        if self.weight_order is not None:
            x = x.index_select(-1, self.weight_order)
        return nn.functional.linear(x, self.rebuilt(), self.bias)


def fill_coded(
    module: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> list[str]:
    """`weights.fill` for a checkpoint in codes: linear layers become `CodedLinear`; warnings.

    Raises:
        ModelError: as `scheme_of`, `split`, `put_codes` and `weights.fill`.
    """
    plain, coded = split(tensors, scheme_of(config, where), where)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    notes = fill(module, with_placeholders(module, plain, coded, dtype), where)
    put_codes(module, coded, where)
    return notes


def with_placeholders(
    module: nn.Module, plain: Mapping[str, Tensor], coded: Mapping[str, Coded], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The plain tensors, with a weight of zeros (which takes no memory) for every coded layer.

    Biases of zeros that some tools write for layers without one are left out.
    """
    modules = dict(module.named_modules())
    found = dict(plain)
    for name, layer in coded.items():
        old = modules.get(_find(modules, name))
        bias = found.get(f"{name}.bias")
        if isinstance(old, nn.Linear) and old.bias is None and bias is not None and not bias.any():
            del found[f"{name}.bias"]
        found[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(layer.q.shape)
    return found


def put_codes(module: nn.Module, coded: Mapping[str, Coded], where: str) -> None:
    """Replaces linear layers by name; a prefix that only the checkpoint has is left aside.

    Raises:
        ModelError: a name is no linear layer of the module, or of another size.
    """
    modules = dict(module.named_modules())
    unknown = []
    for name, layer in coded.items():
        found = _find(modules, name)
        old = modules.get(found)
        if not isinstance(old, nn.Linear):
            unknown.append(name)
            continue
        if tuple(old.weight.shape) != tuple(layer.q.shape):
            raise ModelError(
                f"{name!r} is {tuple(layer.q.shape)} in the file, {tuple(old.weight.shape)} in "
                "the module",
                where=where,
            )
        owner, _, attribute = found.rpartition(".")
        new = CodedLinear(layer, old.bias, old.weight.dtype)
        setattr(module.get_submodule(owner), attribute, new)
    if unknown:
        raise ModelError(
            f"{len(unknown)} quantized layers of the file are no linear layers of the model",
            where=where,
            details=tuple(listed(unknown)),
        )


def _find(modules: Mapping[str, nn.Module], name: str) -> str:
    while name not in modules and "." in name:
        name = name.partition(".")[2]
    return name
