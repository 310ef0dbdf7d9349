"""The new matrices of one attention, from the second moments of what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.factors import eigenspace
from graphwright.ir.layers.products import as_matrix, bias_node, geometry, weight_value
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.passes.decompose._attention.find import Attention, Projection
from graphwright.passes.decompose._attention.rebuild import NewScores, NewValues
from graphwright.passes.decompose._math.modular import channel_moments, column_scores, svd_pair


@dataclass(frozen=True)
class Moments:
    """Of the rows that a layer reads.

    Attributes:
        c: (in, in) mean of x x^T.
        mean: (in,).
    """

    c: Tensor
    mean: Tensor


def heads_of(program: Program, part: Projection) -> tuple[Tensor, Tensor | None]:
    """Weights (heads, d, in) and biases (heads, d) of every head, in float64."""
    weight, bias = matrix_of(program, part.layer)
    return weight[part.rows], None if bias is None else bias[part.rows]


def matrix_of(program: Program, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a layer, in float64."""
    weight = as_matrix(geometry(program, layer), weight_value(program, layer))[0].double()
    node = bias_node(layer)
    return weight, None if node is None else constant_value(program, node).double()


def first_of(groups: Tensor) -> list[int]:
    """One head for every head with keys or values of its own."""
    return [int((groups == group).nonzero()[0]) for group in groups.unique()]


def chosen_columns(
    program: Program, attention: Attention, moments: Mapping[str, Moments], width: int
) -> tuple[NewScores, float]:
    """Queries and keys of the channels of largest score (CR), and the share of all scores these
    have.

    Args:
        program: the program.
        attention: of it.
        moments: of the inputs, by name of the projecting layer.
        width: channels that stay; even under a rotation.
    """
    (wq, bq), (wk, bk) = (heads_of(program, p) for p in (attention.query, attention.key))
    size_q, size_k = (
        torch.stack([channel_moments(w[h], None if b is None else b[h], m.c, m.mean)
                     for h in range(len(w))])
        for w, b, m in ((wq, bq, moments[attention.query.layer.name]),
                        (wk, bk, moments[attention.key.layer.name]))
    )  # fmt: skip
    groups = attention.key.groups
    turn = attention.query.rotation
    pairs = None if turn is None else turn.pairs
    kept, share = [], []
    for group, first in enumerate(first_of(groups)):
        scores = column_scores(size_q[groups == group], size_k[first], pairs)
        count = width if pairs is None else width // 2
        best = scores.topk(count).indices.sort().values
        share.append(float(scores[best].sum() / scores.sum().clamp_min(1e-30)))
        kept.append(best if pairs is None else torch.cat([pairs[best, 0], pairs[best, 1]]))
    own = torch.stack(kept)
    of_query, of_key = own[groups], own
    first_keys = first_of(groups)

    def pick(w: Tensor, where: Tensor) -> Tensor:
        return torch.stack([w[h][where[h]] for h in range(len(w))])

    return NewScores(
        pick(wq, of_query), None if bq is None else pick(bq, of_query),
        pick(wk[first_keys], of_key), None if bk is None else pick(bk[first_keys], of_key),
        None if turn is None else own,
    ), sum(share) / len(share)  # fmt: skip


def factored_scores(
    program: Program, attention: Attention, moments: Mapping[str, Moments], width: int
) -> NewScores:
    """The best queries and keys of that width where nothing turns them: by SVD of their product.

    Biases are weights of an input that is always 1. Arguments as `chosen_columns`.
    """
    found = []
    for part in (attention.query, attention.key):
        (w, b), m = heads_of(program, part), moments[part.layer.name]
        b = w.new_zeros(w.shape[:2]) if b is None else b
        mean = m.mean.double()
        c = torch.cat([torch.cat([m.c.double(), mean[:, None]], 1),
                       torch.cat([mean, mean.new_ones(1)])[None]])  # fmt: skip
        found.append((torch.cat([w, b[..., None]], -1), *eigenspace(c)))
    (wq, root_q, inverse_q), (wk, root_k, inverse_k) = found
    groups = attention.key.groups
    query: list[Tensor] = [wq.new_zeros(0)] * len(groups)
    key = []
    for group, first in enumerate(first_of(groups)):
        heads = (groups == group).nonzero().flatten().tolist()
        # the queries' inputs are the outputs of a second layer, one below the other
        second = torch.cat([root_q.t() @ wq[h].t() for h in heads])
        narrow, wide = svd_pair(wk[first], second, root_k, inverse_k, width)
        key.append(narrow)
        for h, part_of in zip(heads, wide.reshape(len(heads), -1, width), strict=True):
            query[h] = part_of.t() @ inverse_q
    q, k = torch.stack(query), torch.stack(key)
    biased = [heads_of(program, p)[1] is not None for p in (attention.query, attention.key)]
    if not any(biased):
        return NewScores(q[..., :-1], None, k[..., :-1], None, None)
    return NewScores(q[..., :-1], q[..., -1], k[..., :-1], k[..., -1], None)


def factored_values(
    program: Program, attention: Attention, moments: Mapping[str, Moments], width: int
) -> tuple[NewValues, float]:
    """The best values of that width and the output layer that reads them, and their error.

    Rows of attention sum to 1, so the values' bias is a constant behind the output layer, and goes
    into its bias. Arguments as `chosen_columns`.

    Returns:
        Also ||X (W_V W_O - W_V' W_O')|| / ||X W_V W_O|| over all heads.
    """
    wv, bv = heads_of(program, attention.value)
    wo, bo = matrix_of(program, attention.out)
    columns, groups = attention.columns, attention.value.groups
    root, inverse = eigenspace(moments[attention.value.layer.name].c)
    value = []
    out = wo.new_zeros(wo.shape[0], len(groups), width)
    lost = whole = 0.0
    for group, first in enumerate(first_of(groups)):
        heads = (groups == group).nonzero().flatten().tolist()
        second = torch.cat([wo[:, columns[h]] for h in heads])
        narrow, wide = svd_pair(wv[first], second, root, inverse, width)
        value.append(narrow)
        for h, part in zip(heads, wide.reshape(len(heads), -1, width), strict=True):
            out[:, h] = part
        exact = (root.t() @ wv[first].t()) @ second.t()
        lost += float((exact - (root.t() @ narrow.t()) @ wide.t()).square().sum())
        whole += float(exact.square().sum())
    if bv is not None:
        constant = torch.stack([wo[:, columns[h]] @ bv[h] for h in range(len(groups))]).sum(0)
        bo = constant if bo is None else bo + constant
    error = (lost / max(whole, 1e-30)) ** 0.5
    return NewValues(torch.stack(value), out.flatten(1), bo), error
