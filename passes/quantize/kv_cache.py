"""quantize.kv_cache: keys and values of a decoder's cache in 8, 4 or 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphwright.ir.calibration.observe import observe
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.generation.record import Generation
from graphwright.ir.graph.nodes import argument
from graphwright.ir.ops.quantize_cache import SMALLEST, cache_codes, largest_code, quantize_cache
from graphwright.ir.options import Bounded, Rule
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Need, Pass, Result

aten = torch.ops.aten
KEPT = 512
"""Tokens of calibration data that scales are searched on, per layer."""

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Shares of the largest value that the largest code may stand for."""


class KvCacheOptions(Bounded):
    """Options of quantize.kv_cache."""

    bits: Literal[4, 8, 16] = 8
    """Bits of a number: whole-number codes with scales, or half-precision floats."""

    scales: Literal["mixed", "channel", "token"] = "mixed"
    """`mixed`: keys have a scale per head and channel, found from calibration data, for some of
    their channels are far larger than others; values have one per head and token, found as they
    are written. `channel` and `token`: both in the one way."""

    rules = (
        Rule("scales", "bits != 16 or 'scales' not in given",
             "scales have no part in a cache of half-precision floats"),
    )  # fmt: skip


class Extremes:
    """Largest absolute values (heads, size) of keys or values, and some of their tokens."""

    def __init__(self) -> None:
        self.peak: Tensor | None = None
        self.tokens: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Takes note of (batch, heads, tokens, size)."""
        rows = x.detach().transpose(0, 1).flatten(1, 2).float()
        peak = rows.abs().amax(1)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        missing = KEPT - sum(part.shape[1] for part in self.tokens)
        if missing > 0:
            step = max(1, rows.shape[1] // 64)
            self.tokens.append(rows[:, ::step][:, :missing].clone())

    def scale(self, bits: int) -> Tensor:
        """(heads, 1, size): of the scales tried, the one with the least squared error."""
        assert self.peak is not None
        return channel_scale(self.peak, torch.cat(self.tokens, 1), bits)


def channel_scale(peak: Tensor, tokens: Tensor, bits: int) -> Tensor:
    """Scales of channels: a share of the peak over the largest code, with the least error.

    Args:
        peak: (heads, size) largest absolute values.
        tokens: (heads, tokens, size) to measure the error on.
        bits: of a code.

    Returns:
        (heads, 1, size).
    """
    whole = (peak / largest_code(bits)).clamp_min(SMALLEST)[:, None]
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in SHARES:
        scale = whole * share
        error = (cache_codes(tokens, scale, bits) * scale - tokens).square().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


class KvCache(Pass[KvCacheOptions]):
    """Stores the cache of keys and values in fewer bits, which is most of the memory of long texts.

    Behind every new part of a cache stands `graphwright::quantize_cache`: the program computes
    what an artifact does that stores codes, so that all checks see its error. The triton backend
    stores int8 codes, or two 4-bit codes in a byte, and its attention multiplies them as they are.
    The backend onnxruntime rounds the cache in the same way but stores it in floats: what it costs
    in accuracy is seen there too, memory is not saved, and a warning says so.

    Source: Liu et al. 2024, "KIVI", section 3, whose finding about channels and tokens this is.
    Codes here are symmetric, and the scales of channels are fixed beforehand and not per group of
    tokens; 2 bits, which need those groups, are not offered.
    """

    contract = "lossy"
    needs = "calibration"
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {
        ("scales", "token"): "nothing",
        ("bits", 16): "nothing",
    }
    weights = "kept"
    after = ("cleanup.*", "prune.*", "reparameterize.*")
    lowers_to = ("onnxruntime", "triton")

    def run(self, program: Program, context: Context) -> Result:
        record = Generation.of(program)
        if record is None or record.kind != "decoder" or not record.layers:
            raise ModelError(
                f"{self.id} needs a decoder with a cache of keys and values",
                fix="Load the model with `model: {task: generation}`.",
            )
        editor = Editor(program, by=self.id)
        joins = _joins(editor, record)
        actions = [Action.left(name, why) for name, why in joins.items() if isinstance(why, str)]
        found = {name: node for name, node in joins.items() if isinstance(node, fx.Node)}
        if not found:
            raise ModelError(f"{self.id} can quantize no cache: {actions[0].reason}")
        scales = self._scales(program, found, context)
        for name, join in found.items():
            actions.append(self._quantize(editor, name, join, scales.get(name)))
        return Result(editor.finish(), tuple(actions))

    def _scales(
        self, program: Program, joins: dict[str, fx.Node], context: Context
    ) -> dict[str, Tensor]:
        """Scales of the caches that have them per channel, by name of the past."""
        bits, kind = self.options.bits, self.options.scales
        if bits == 16 or kind == "token":
            return {}
        nodes = {
            name: _parts(join)[1].name
            for name, join in joins.items()
            if kind == "channel" or _holds_keys(program, name)
        }
        seen = {node: Extremes() for node in nodes.values()}
        observe(program, seen, context.batches, context.progress)
        return {name: seen[node].scale(bits) for name, node in nodes.items()}

    def _quantize(self, editor: Editor, name: str, join: fx.Node, scale: Tensor | None) -> Action:
        bits = self.options.bits
        past, new = _parts(join)
        stored = None
        if scale is not None:
            stored = editor.get(editor.add_state(f"kv_cache.{name}_scale", scale))
        rounded = editor.call(quantize_cache, new, stored, bits, before=join)
        editor.set_args(join, [past, rounded], *join.args[1:], **join.kwargs)
        how = "half-precision" if bits == 16 else "a scale per token"
        return Action(name, f"{bits} bits, {how if scale is None else 'a scale per channel'}")


def _parts(join: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Past and new part."""
    parts: Any = join.args[0]
    return parts[0], parts[1]


def _holds_keys(program: Program, name: str) -> bool:
    record = Generation.of(program)
    return record is not None and any(layer.past_key == name for layer in record.layers)


def _joins(editor: Editor, record: Generation) -> dict[str, fx.Node | str]:
    """Of every cache, by the name of its past: its `cat(past, new)`, or why there is none."""
    names = [spec.name for spec in editor.program.signature.outputs]
    flat: Any = editor.graph.output_node().args[0]
    found: dict[str, fx.Node | str] = {}
    for past, present in zip(record.past, record.present, strict=True):
        node = flat[names.index(present)]
        is_join = node.target is aten.cat.default and argument(node, 1, "dim", 0) in (2, -2)
        parts: Any = node.args[0] if is_join else ()
        if len(parts) != 2 or parts[0].op != "placeholder":
            found[past] = "its new part is not joined to the past"
        elif parts[1].target is quantize_cache:
            found[past] = "it is quantized already"
        else:
            found[past] = node
    return found
