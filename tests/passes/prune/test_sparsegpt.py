"""prune.sparsegpt as a pass: true sequence, convolutions, patterns, and its refusals."""

import pytest
import torch
from models.masked_nets import error, images, mixed

from graphwright.ir.calibration.hessian import inverse_factor
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.passes.prune._masks.patterns import Pattern
from graphwright.passes.prune._math.sparsegpt import prune_matrix
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.prune.sparsegpt import Sparsegpt
from graphwright.passes.prune.wanda import Wanda

CHAIN = ("text", [("prune.sparsegpt", {"sparsity": 0.5})])


def test_a_layer_is_pruned_on_what_pruned_layers_give():
    dense, batches = mixed(), images()
    pruned = Sparsegpt(sparsity=0.5, targets=["fc*"])(dense, calibration=batches)
    x = torch.cat([b[0] for b in batches])
    s = {k: v.detach() for k, v in dense.state.items()}
    f = torch.nn.functional
    h = torch.relu(f.conv2d(x, s["conv.weight"], s["conv.bias"], padding=1))
    h = torch.relu(f.conv2d(h, s["grouped.weight"], s["grouped.bias"], stride=2, groups=4))
    h = f.layer_norm(h.flatten(1), (32,), s["norm.weight"], s["norm.bias"])
    for name, bias in (("fc1.weight", s["fc1.bias"]), ("fc2.weight", None)):
        upper, _ = inverse_factor(h.T @ h / len(h), 0.01)
        expected, _ = prune_matrix(s[name], upper, Pattern(0.5))
        torch.testing.assert_close(pruned.state[name].detach(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(pruned.state[name] == 0, expected == 0)
        h = torch.relu(f.linear(h, pruned.state[name].detach(), bias))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_outputs_are_nearest(pattern):
    dense, batches = mixed(), images()
    options = {"pattern": pattern, "targets": ["conv", "fc*"]}
    ours = Sparsegpt(**options)(dense, calibration=batches)
    wanda = Wanda(**options)(dense, calibration=batches)
    magnitude = Magnitude(**options)(dense)
    assert error(dense, ours, batches) < 0.8 * error(dense, wanda, batches)
    assert error(dense, ours, batches) < 0.8 * error(dense, magnitude, batches)


def test_groups_of_a_convolution_are_matrices_of_their_own():
    dense, batches = mixed(), images()
    result = Sparsegpt(sparsity=0.5, targets=["grouped"]).execute(
        dense, Context(calibration=batches)
    )
    w = result.program.state["grouped.weight"].detach().reshape(4, 36)
    assert bool(((w == 0).sum(1) == 18).all())
    assert error(dense, result.program, batches) > 0
    assert 0 < result.metrics["layer_error_mean"] < 1


def test_the_reported_error_is_that_of_the_layers_output():
    dense, batches = mixed(), images()
    result = Sparsegpt(sparsity=0.5, targets=["conv"]).execute(dense, Context(calibration=batches))
    x = torch.cat([b[0] for b in batches])
    old, new = (p.state["conv.weight"].detach() for p in (dense, result.program))
    y = torch.nn.functional.conv2d(x, old, padding=1)
    gap = y - torch.nn.functional.conv2d(x, new, padding=1)
    assert result.metrics["layer_error_max"] == pytest.approx(
        float(gap.norm() / y.norm()), rel=1e-3
    )


def test_few_samples_and_dead_inputs_are_survived():
    dense, batches = mixed(), images(1, 2)
    dead = [(b[0] * torch.tensor([1.0, 0, 1, 1]).reshape(1, 4, 1, 1),) for b in batches]
    pruned = Sparsegpt(sparsity=0.5)(dense, calibration=dead)
    w = pruned.state["conv.weight"].detach()
    assert bool((w[:, 1] == 0).all())  # nothing ever came in there
    assert all(bool(torch.isfinite(t).all()) for t in pruned.state.values())


def test_nan_in_the_data_is_one_clear_error():
    bad = images(2)
    bad[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="batch 1 gives NaN or infinity in front of 'conv'"):
        Sparsegpt()(mixed(), calibration=bad)


def test_the_same_bytes_every_time():
    runs = [Sparsegpt()(mixed(), calibration=images()) for _ in range(2)]
    for name, value in runs[0].state.items():
        assert torch.equal(value, runs[1].state[name])
