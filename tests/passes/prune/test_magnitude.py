"""prune.magnitude: exact shares, scopes, patterns, and what is left alone."""

import pytest
import torch
from models.masked_nets import mixed, tied

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.prune.magnitude import Magnitude

CHAIN = ("conv", [("prune.magnitude", {"sparsity": 0.5})])

LAYERS = ("conv", "grouped", "fc1", "fc2")


def weights(program):
    return {name: program.state[f"{name}.weight"].detach() for name in LAYERS}


def test_a_layer_loses_its_smallest_weights_and_nothing_else_changes():
    dense = mixed()
    pruned = Magnitude(sparsity=0.4)(dense)
    for name, w in weights(dense).items():
        new = weights(pruned)[name]
        kept = new != 0
        assert int((~kept).sum()) == int(w.numel() * 0.4)
        assert torch.equal(new[kept], w[kept])
        assert w[kept].abs().min() >= w[~kept].abs().max()
    for name in ("conv.bias", "fc1.bias", "norm.weight"):
        assert pruned.state[name] is dense.state[name]


def test_rows_have_equally_many_zeros():
    pruned = Magnitude(sparsity=0.5, scope="row")(mixed())
    for w in weights(pruned).values():
        zeros = (w.flatten(1) == 0).sum(1)
        assert bool((zeros == int(w[0].numel() * 0.5)).all())


def test_all_layers_together_lose_exactly_the_smallest():
    dense = mixed()
    pruned = Magnitude(sparsity=0.3, scope="global")(dense)
    old = torch.cat([w.flatten() for w in weights(dense).values()])
    new = torch.cat([w.flatten() for w in weights(pruned).values()])
    limit = old.abs().sort().values[int(0.3 * len(old))]
    assert torch.equal(new, old.where(old.abs() >= limit, 0.0))


def test_ties_at_the_limit_do_not_change_the_count():
    dense = mixed()
    flat = {f"{n}.weight": torch.nn.Parameter(w.sign()) for n, w in weights(dense).items()}
    same = dense.replace(state={**dense.state, **flat})
    pruned = Magnitude(sparsity=0.3, scope="global")(same)
    old = torch.cat([w.flatten() for w in weights(same).values()])
    new = torch.cat([w.flatten() for w in weights(pruned).values()])
    assert int((new == 0).sum()) == int(0.3 * len(old))


def test_two_of_four_in_every_group_and_the_rest_says_why_not():
    dense = mixed()
    result = Magnitude(pattern="2:4").execute(dense, Context())
    for name in ("conv", "fc1", "fc2"):
        w = weights(result.program)[name].flatten(1)
        assert bool(((w.reshape(len(w), -1, 4) != 0).sum(2) == 2).all())
    left = next(a for a in result.actions if a.layer == "grouped")
    assert left.what == "left alone"
    assert "18 inputs do not divide into groups of 4" in left.reason
    assert torch.equal(weights(result.program)["grouped"], weights(dense)["grouped"])


def test_a_weight_that_an_embedding_reads_stays_and_one_read_twice_is_pruned_once():
    result = Magnitude(sparsity=0.5).execute(tied(), Context())
    assert {a.layer: a.what for a in result.actions} == {
        "twice": "50.0% zeros",
        "head": "left alone",
    }
    assert int((result.program.state["twice.weight"] == 0).sum()) == 32


def test_a_matmul_weight_is_pruned_along_its_inputs():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return x @ self.weight

    program = gw.trace(Product().eval(), (torch.randn(3, 8),))
    w = Magnitude(pattern="1:4")(program).state["weight"].T
    assert bool(((w.reshape(6, 2, 4) != 0).sum(2) == 1).all())


def test_half_precision_stays_half_precision():
    program = gw.trace(torch.nn.Linear(16, 8).half().eval(), (torch.randn(2, 16).half(),))
    w = Magnitude()(program).state["weight"]
    assert w.dtype == torch.float16
    assert int((w == 0).sum()) == 64


def test_refusals():
    with pytest.raises(ArgumentError, match="compares within its groups"):
        Magnitude(pattern="2:4", scope="layer")
    with pytest.raises(ModelError, match="do not divide into groups of 5"):
        Magnitude(pattern="2:5", targets=["fc1"])(mixed())
    broken = mixed()
    bad = broken.state["fc1.weight"].detach().clone()
    bad[0, 0] = float("nan")
    broken = broken.replace(state={**broken.state, "fc1.weight": bad})
    with pytest.raises(ModelError, match="holds NaN"):
        Magnitude()(broken)


def test_zero_sparsity_changes_nothing():
    dense = mixed()
    pruned = Magnitude(sparsity=0.0, scope="global")(dense)
    assert all(torch.equal(pruned.state[k], v) for k, v in dense.state.items())
