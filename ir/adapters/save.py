"""Writes a program's adapter in the format of Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.adapters.peft_files import write_peft
from graphwright.ir.adapters.record import Adapter, adapters, find_adapter
from graphwright.ir.adapters.slices import SLOTS, spread, spread_factors
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import TURNED
from graphwright.ir.layers.products import weight_node, weight_value
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program

Parts = Mapping[str, Tensor]


def save_adapter(
    program: Program, folder: str | Path, name: str = "default", *, base: Program | None = None
) -> None:
    """Writes one adapter so that PEFT loads it onto the original model.

    LoRA and DoRA are written as they are; cores, pivots and groups of changes as the low-rank
    change that they are; IA3 and Kronecker factors as PEFT's own kinds. An adapter that goes with
    a residual (PiSSA, LoLDU) is written as a change of `base`, of twice its rank. Parameters that
    were trained beside it are written whole.

    Args:
        program: with the adapter in it, not merged.
        folder: made when it is not there; an adapter of another name than `default` goes into a
            folder of that name in it, as PEFT does.
        name: of the adapter.
        base: the program before the adapter was put in, for those with a residual.

    Raises:
        ArgumentError: the program has no such adapter.
        ModelError: PEFT has no form for it, or `base` is missing.
    """
    adapter = find_adapter(program, name)
    if not any(adapter.layers.values()):
        raise ModelError(
            f"PEFT has no form for adapter {name!r} of {adapter.kind}, which is beside no layer",
            fix="Save the program with it: `program.save(path)`.",
        )
    place = Path(folder) if name == "default" else Path(folder) / name
    by_name = {layer.name: layer for layer in reversed(layers(program))}
    given = {layer: _parts(program, adapter, layer) for layer in adapter.layers}
    saved = _trained_beside(program)
    common: dict[str, Any] = {
        "target_modules": list(given),
        "modules_to_save": sorted({n.rpartition(".")[0] for n in saved}) or None,
    }
    first = next(iter(given.values()))
    if {"ia3_in", "ia3_out"} & set(first):
        inner = [layer for layer, parts in given.items() if "ia3_in" in parts]
        config = {"peft_type": "IA3", "feedforward_modules": inner, **common}
        tensors = {layer: {".ia3_l": _factors(by_name[layer], p)} for layer, p in given.items()}
        write_peft(place, config, tensors, saved)
    elif "krona_a" in first:
        if adapter.options.get("layout") == "interleaved":
            raise ModelError("PEFT has no form for the layout interleaved of adapt.krona")
        write_peft(place, {"peft_type": "LOKR", **_as_lokr(given), **common}, {
            layer: {".lokr_w1": p["krona_a"], ".lokr_w2": p["krona_b"]}
            for layer, p in given.items()
        }, saved)  # fmt: skip
    else:
        _write_lora(place, program, adapter, base, by_name, given, common, saved)


def _write_lora(
    place: Path,
    program: Program,
    adapter: Adapter,
    base: Program | None,
    by_name: Mapping[str, Layer],
    given: Mapping[str, Parts],
    common: dict[str, Any],
    saved: Parts,
) -> None:
    tensors: dict[str, dict[str, Tensor]] = {}
    ranks, alphas = {}, {}
    for name, parts in given.items():
        layer = by_name[name]
        a, b, scale = low_rank(parts, adapter.scales.get(name, 1.0), adapter, layer)
        if adapter.residual:
            a, b = _on_base(program, base, layer, a, b * scale)
            scale = 1.0
        is_table = layer.kind == "embedding"
        rank = a.shape[1] if is_table else len(a)
        ranks[name], alphas[name] = rank, scale * rank
        tensors[name] = (
            {".lora_embedding_A": a.t(), ".lora_embedding_B": b}
            if is_table
            else {".lora_A.weight": a, ".lora_B.weight": b}
        )
        if "magnitude" in parts:
            ones = (1,) * (b.dim() - 2)
            lengths = parts["magnitude"]
            tensors[name][".lora_magnitude_vector"] = (
                lengths.reshape(1, -1, *ones) if ones else lengths
            )
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "lora_dropout": float(adapter.options.get("dropout") or 0.0),
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: value for n, value in alphas.items() if value != alpha},
        "use_dora": "magnitude" in next(iter(given.values())),
        "fan_in_fan_out": all(by_name[n].kind in TURNED for n in given),
        "init_lora_weights": True, "bias": "none",
        **common,
    }  # fmt: skip
    write_peft(place, config, tensors, saved)


def low_rank(
    parts: Parts, scale: float, adapter: Adapter, layer: Layer
) -> tuple[Tensor, Tensor, float]:
    """An adapter's change of a layer as a, b and a factor.

    Raises:
        ModelError: it is no low-rank change.
    """
    if "pivots" in parts:
        lower = parts["lower"]
        pivots = parts["pivots"].reshape(1, -1, *(1,) * (lower.dim() - 2))
        return parts["upper"], lower * pivots, float(parts.get("scale", scale))
    if {"columns", "rows"} & set(parts):
        return *_blocks(parts, layer), 1.0
    if not {"lora_a", "lora_b"} <= set(parts):
        raise ModelError(f"there is no low-rank form of {adapter.kind} beside {layer.name!r}")
    a, b = parts["lora_a"], parts["lora_b"]
    if SLOTS in parts:
        b = spread(b, parts[SLOTS])
    if "core" in parts:
        a = (parts["core"] @ a.flatten(1)).reshape(a.shape)
    return a, b, scale


def _blocks(parts: Parts, layer: Layer) -> tuple[Tensor, Tensor]:
    """Blocks of columns and rows as a, b: one side of each says where it is."""
    out, inputs = weight_node(layer).meta["val"].shape[:: -1 if layer.kind in TURNED else 1]
    left: list[Tensor] = []
    right: list[Tensor] = []
    if "columns" in parts:
        values, places = parts["column_values"], parts["columns"]
        left.append(values)
        right.append(_one_hot(places, int(inputs), values.dtype))
    if "rows" in parts:
        values, places = parts["row_values"], parts["rows"]
        left.append(_one_hot(places, int(out), values.dtype).t())
        right.append(values)
    return torch.cat(right), torch.cat(left, 1)


def _one_hot(places: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(places, size).to(dtype)


def _on_base(
    program: Program, base: Program | None, layer: Layer, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of the change against the original weight: those given, less what moved out of it."""
    if base is None:
        raise ModelError(
            "this adapter goes with a residual: it is a change of the original weights only "
            "together with them",
            fix="Give base=, the program before the adapter was put in.",
        )
    before = next((other for other in layers(base) if other.name == layer.name), None)
    if before is None:
        raise ModelError(f"the base has no layer {layer.name!r}")
    moved = weight_value(base, before).double() - weight_value(program, layer).double()
    matrix = moved.t() if layer.kind in TURNED else moved.flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank, kernel = len(a), a.shape[1:]
    left = (-u[:, :rank] * s[:rank].sqrt()).to(b.dtype).reshape(b.shape)
    right = (s[:rank].sqrt()[:, None] * vh[:rank]).to(a.dtype).reshape(rank, *kernel)
    return torch.cat([a, right]), torch.cat([b, left], 1)


def _as_lokr(given: Mapping[str, Parts]) -> dict[str, Any]:
    """Options under which PEFT makes factors of these sizes, both whole.

    Raises:
        ModelError: it makes none such: it splits outputs and inputs by one and the same number.
    """
    factors = set()
    for parts in given.values():
        (a1, a2), (b1, b2) = parts["krona_a"].shape, parts["krona_b"].shape[:2]
        fits = [f for f in {a1, b1} if min(f, a1 * b1 // f) == a1 and not (a2 * b2) % f
                and min(f, a2 * b2 // f) == a2]  # fmt: skip
        factors.add(fits[0] if fits else 0)
    if len(factors) > 1 or 0 in factors:
        raise ModelError(
            "PEFT splits outputs and inputs of all layers by one number, and has no form for the "
            "factors of this adapt.krona",
            fix="Use one number for factor_out and factor_in, at most the root of both sizes.",
        )
    # a rank from which on PEFT keeps the factors whole
    size = max(max(p.shape) for parts in given.values() for p in parts.values())
    return {"r": size, "alpha": size, "decompose_factor": factors.pop()}


def _factors(layer: Layer, parts: Parts) -> Tensor:
    """IA3's factors in PEFT's shapes: (out, 1) or (1, in), with a convolution (1, channels, 1)."""
    is_inner = "ia3_in" in parts
    factors = parts["ia3_in" if is_inner else "ia3_out"]
    factors = spread_factors(factors, parts[SLOTS]) if SLOTS in parts else factors
    if layer.kind.startswith("conv"):
        spatial = int(layer.kind[4])
        return factors.reshape(1, -1, *(1,) * spatial)
    return factors.reshape(1, -1) if is_inner else factors.reshape(-1, 1)


def _parts(program: Program, adapter: Adapter, layer: str) -> dict[str, Tensor]:
    return {part: program.state[n].detach() for part, n in adapter.layers[layer].items()}


def _trained_beside(program: Program) -> dict[str, Tensor]:
    """Parameters that are trained and belong to no adapter."""
    own = {name for adapter in adapters(program).values() for name in adapter.tensors()}
    return {n: p.detach() for n, p in program.trainable().items() if n not in own}
