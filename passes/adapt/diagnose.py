"""adapt.diagnose: how far attention under an adapter is from the bound of fast training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import adapter_of, full_arguments, gw_meta
from graphwright.ir.layers.kinds import KINDS, PRODUCTS
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.adapt._math.taylor_attention import (
    Gradients,
    approximate_gradients,
    exact_gradients,
    feature_count,
    needed_degree,
)
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten

FARTHEST = 1024.0
"""Largest factor of a change that is looked at."""


class DiagnoseOptions(Options):
    """Options of adapt.diagnose."""

    samples: Annotated[int, Field(ge=1)] = 8
    """Calibration samples that are looked at, the first ones."""

    limit: Annotated[float, Field(gt=0)] = 1.0
    """Bound of rho, the largest entry of queries and keys over the root of ln(length)."""

    error: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Error of every entry of exp that the series for the fast gradient is to keep."""


class Diagnose(Pass[DiagnoseOptions]):
    """Reports, attention by attention, whether its gradient could be had in near-linear time.

    The gradient of low-rank adapters can be approximated in time almost linear in the length
    where the entries of scaled queries and keys are small against the root of ln(length), and in no
    sub-quadratic time where they are not. Reported are the largest entries with and without the
    adapter's change (on the same input), their ratio rho to that root, the largest score, and the
    factor of the change at which rho crosses the bound. The mean key is taken off first: no
    probability changes by it. Where rho is within the bound and the series of exp needs fewer
    features than there are tokens, the chain of low-rank products is run on the first sample: its
    error against the exact gradient, for a random gradient of the output, and its time. Heads of
    usual widths are not in that regime, and the report says so. The program stays as it is.

    Source: Hu et al. 2024, "Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for
    Transformer Models", definitions 2 and 3, theorems 1 and 3.
    """

    contract = "exact"
    needs = "calibration"
    weights = "kept"
    papers = ("P39",)

    def run(self, program: Program, context: Context) -> Result:
        found = _watch(program, context, self.options.samples)
        actions: list[Action] = []
        metrics = {"attentions": float(len(found)), "within_limit": 0.0, "fast_gradients": 0.0,
                   "largest_rho": 0.0, "largest_gradient_error": 0.0}  # fmt: skip
        for seen in found:
            rho, text = self._norms(seen)
            fast, error, more = self._gradient(seen, rho, context.generator(seen.name))
            actions.append(Action(seen.name, text, more, changed=False))
            metrics["within_limit"] += rho <= self.options.limit
            metrics["fast_gradients"] += fast
            metrics["largest_rho"] = max(metrics["largest_rho"], rho)
            metrics["largest_gradient_error"] = max(metrics["largest_gradient_error"], error)
        return Result(program, tuple(actions), metrics)

    def _norms(self, seen: _Attention) -> tuple[float, str]:
        root = math.sqrt(math.log(seen.length))
        size, score = _size(seen, 1.0), _score(seen)
        rho = size / root
        text = f"largest entry {size:.3g}, rho {rho:.3g}, largest score {score:.3g}"
        if seen.is_adapted:
            text += f"; without the adapter rho {_size(seen, 0.0) / root:.3g}"
            crossing = crossing_factor(lambda s: _size(seen, s) / root, self.options.limit)
            text += (f", {self.options.limit:g} at {crossing:.3g} times its change"
                     if crossing is not None else "")  # fmt: skip
        return rho, text

    def _gradient(
        self, seen: _Attention, rho: float, generator: torch.Generator
    ) -> tuple[bool, float, str]:
        """Whether the fast gradient applies, its error, and the report."""
        if rho > self.options.limit:
            return False, 0.0, f"no fast gradient: rho is above {self.options.limit:g}"
        if seen.masked:
            return False, 0.0, "no fast gradient: a mask that is not causal"
        q, k = seen.queries[0][:1], seen.keys[0][:1]
        v = seen.values[0][:1]
        degree = needed_degree(_score(seen), self.options.error)
        count = feature_count(q.shape[-1], degree)
        if count >= q.shape[-2]:
            return (
                False,
                0.0,
                (
                    f"no fast gradient: degree {degree} asks for {count} features, and there are "
                    f"{q.shape[-2]} tokens"
                ),
            )
        upstream = torch.randn(v.shape, generator=generator).to(v.dtype)
        slow, exact = _timed(lambda: exact_gradients(q, k, v, upstream, causal=seen.causal))
        fast, near = _timed(
            lambda: approximate_gradients(q, k, v, upstream, degree, causal=seen.causal)
        )
        error = max(float((a - b).norm() / b.norm().clamp_min(1e-30))
                    for a, b in zip(near[1:], exact[1:], strict=True))  # fmt: skip
        return (
            True,
            error,
            (
                f"fast gradient of degree {degree} with {count} features: relative error "
                f"{error:.1e}, {fast * 1e3:.2g} ms against {slow * 1e3:.2g} ms"
            ),
        )


@dataclass
class _Attention:
    """What one attention has read: queries with the scale in them, keys less their mean, values.

    Attributes:
        name: of its module.
        queries, keys, values: (batch, heads, length, width) each, one of every batch.
        plain_queries, plain_keys: the same without the adapter's change of this attention.
        causal: whether a query sees keys up to its own place only.
        masked: whether another mask is laid over the scores.
    """

    name: str
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    plain_queries: list[Tensor] = field(default_factory=list)
    plain_keys: list[Tensor] = field(default_factory=list)
    causal: bool = False
    masked: bool = False
    is_adapted: bool = False

    @property
    def length(self) -> int:
        return max(2, *(k.shape[-2] for k in self.keys)) if self.keys else 2


def _watch(program: Program, context: Context, samples: int) -> list[_Attention]:
    """Runs calibration samples, and keeps what every attention reads.

    Raises:
        ModelError: the program has no attention.
    """
    target = aten.scaled_dot_product_attention.default
    nodes = list(program.graph.find_nodes(op="call_function", target=target))
    if not nodes:
        raise ModelError("the program has no scaled dot product attention to look at")
    found = {node: _Attention(_name(node)) for node in nodes}
    left = samples
    for batch in as_batches(context.batches, program.signature):
        inputs = program.bind(**{name: t[:left] for name, t in batch.items()})
        runner = fx.Interpreter(program.module, garbage_collect_values=False)
        with torch.no_grad():
            runner.run(*inputs)
            for node in nodes:
                _keep(found[node], node, runner.env)
        left -= len(inputs[0])
        if left <= 0:
            break
    return list(found.values())


def _keep(seen: _Attention, node: fx.Node, env: dict[fx.Node, Any]) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    args, kwargs = full_arguments(node)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = (env[given[name]].detach() for name in names[:3])
    scale = given["scale"] or 1 / math.sqrt(q.shape[-1])
    times = q.shape[-3] // k.shape[-3]
    memo: dict[fx.Node, Any] = {}
    plain_q, plain_k = (_without(given[name], env, memo) for name in names[:2])
    seen.is_adapted |= plain_q is not q and (plain_q is not env[given["query"]]
                                             or plain_k is not env[given["key"]])  # fmt: skip
    root = math.sqrt(scale)

    def keys(values: Tensor) -> Tensor:
        wide = values.detach().repeat_interleave(times, -3) if times > 1 else values.detach()
        return root * (wide - wide.mean(-2, keepdim=True))

    seen.queries.append(root * q)
    seen.keys.append(keys(k))
    seen.values.append(v.repeat_interleave(times, -3) if times > 1 else v)
    seen.plain_queries.append(root * plain_q.detach())
    seen.plain_keys.append(keys(plain_k))
    _note_mask(seen, given, env, q.shape[-2], k.shape[-2])


def _note_mask(
    seen: _Attention, given: dict[str, Any], env: dict[fx.Node, Any], rows: int, columns: int
) -> None:
    mask = given["attn_mask"]
    seen.causal |= bool(given["is_causal"])
    if mask is None:
        return
    value = env[mask]
    open_ = value if value.dtype == torch.bool else value == 0
    below = torch.ones(rows, columns, dtype=torch.bool).tril()
    if bool(open_.all()):
        return
    if rows == columns and bool((open_ == below).all()):
        seen.causal = True
    else:
        seen.masked = True


def _without(node: fx.Node, env: dict[fx.Node, Any], memo: dict[fx.Node, Any]) -> Any:
    """The value that a node has without the change of the adapted layer that it comes from.

    The layers in front keep their adapters: the input is the same.
    """
    if node in memo:
        return memo[node]
    value = env[node]
    if "adapter_of" in gw_meta(node) and adapter_of(node):
        call = node
        while adapter_of(call):
            first = call.args[0]
            assert isinstance(first, fx.Node)
            call = first
        value = env[call]
    elif node.op == "call_function" and KINDS.get(node.target) not in PRODUCTS:
        inputs = {n: _without(n, env, memo) for n in node.all_input_nodes}
        if any(new is not env[n] for n, new in inputs.items()):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: inputs[n])
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    memo[node] = value
    return value


def _size(seen: _Attention, factor: float) -> float:
    """Largest entry of queries and keys, with the adapter's change times a factor."""
    largest = 0.0
    for with_, plain in ((seen.queries, seen.plain_queries), (seen.keys, seen.plain_keys)):
        for a, b in zip(with_, plain, strict=True):
            largest = max(largest, float((b + factor * (a - b)).abs().max()))
    return largest


def _score(seen: _Attention) -> float:
    return max(float((q @ k.transpose(-1, -2)).abs().max())
               for q, k in zip(seen.queries, seen.keys, strict=True))  # fmt: skip


def crossing_factor(rho: Callable[[float], float], limit: float) -> float | None:
    """The factor nearest to 1 at which rho crosses the limit; None up to 1024 times the change.

    Args:
        rho: convex in its factor.
        limit: of rho.
    """
    inside, outside = (1.0, 2.0) if rho(1.0) <= limit else (0.0, 1.0)
    if rho(inside) > limit:
        return None
    while rho(outside) <= limit:
        inside, outside = outside, 2 * outside
        if outside > FARTHEST:
            return None
    for _ in range(40):
        middle = (inside + outside) / 2
        if rho(middle) <= limit:
            inside = middle
        else:
            outside = middle
    return outside


def _name(node: fx.Node) -> str:
    scopes = list(node.meta.get("nn_module_stack", {}))
    return str(scopes[-1]) if scopes and scopes[-1] else node.name


def _timed(function: Callable[[], Gradients]) -> tuple[float, Gradients]:
    """The least of three times in seconds, and the result."""
    function()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result
