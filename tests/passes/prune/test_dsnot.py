"""prune.dsnot as a pass: every base, existing masks, and what it refuses."""

import pytest
import torch
from models.masked_nets import images, mixed

from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune.dsnot import Dsnot
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.prune.sparsegpt import Sparsegpt
from graphwright.passes.prune.wanda import Wanda

CHAIN = ("text", [("prune.dsnot", {"sparsity": 0.5})])

LAYERS = ("conv", "fc1", "fc2")


def flat(program, name):
    return program.state[f"{name}.weight"].detach().flatten(1)


def refined(dense, **options):
    result = Dsnot(targets=list(LAYERS), threshold=0.01, **options).execute(
        dense, Context(calibration=images(), teacher=dense)
    )
    assert result.metrics["trades"] > 0
    assert result.metrics["expected_change_after"] < result.metrics["expected_change_before"]
    return result


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("base", ["magnitude", "wanda", "sparsegpt"])
def test_shares_stay_and_no_weight_gets_a_new_value(base, pattern):
    dense = mixed()
    result = refined(dense, base=base, pattern=pattern)
    for name in LAYERS:
        old, new = flat(dense, name), flat(result.program, name)
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        assert bool((kept.sum(1) == old.shape[1] - old.shape[1] // 2).all())
        if pattern == "2:4":
            assert bool((kept.reshape(len(old), -1, 4).sum(2) == 2).all())


def test_the_first_layers_mean_output_comes_back():
    dense, batches = mixed(), images()
    x = torch.cat([b[0] for b in batches])

    def mean_change(program):
        gap = dense.state["conv.weight"].detach() - program.state["conv.weight"].detach()
        return torch.nn.functional.conv2d(x, gap, padding=1).mean((0, 2, 3)).abs()

    wanda = Wanda(targets=["conv"])(dense, calibration=batches)
    after = Dsnot(targets=["conv"], threshold=0.01)(dense, calibration=batches)
    assert bool((mean_change(after) <= mean_change(wanda) + 1e-6).all())
    assert float(mean_change(after).mean()) < 0.8 * float(mean_change(wanda).mean())


def test_an_existing_mask_gives_what_the_same_base_gives():
    """On one layer, the two ways to the same mask meet."""
    dense, batches = mixed(), images()
    inside = Dsnot(base="wanda", targets=["fc1"])(dense, calibration=batches)
    masked = Wanda(targets=["fc1"])(dense, calibration=batches)
    outside = Dsnot(base="existing", targets=["fc1"])(masked, calibration=batches, teacher=dense)
    assert not torch.equal(flat(masked, "fc1"), flat(outside, "fc1"))
    assert torch.equal(flat(inside, "fc1"), flat(outside, "fc1"))


def test_an_existing_pattern_is_kept_and_a_dense_layer_is_left_alone():
    dense = mixed()
    masked = Magnitude(pattern="2:4", targets=["fc1"])(dense)
    result = refined_existing(masked, dense)
    kept = flat(result.program, "fc1") != 0
    assert bool((kept.reshape(24, -1, 4).sum(2) == 2).all())
    assert {a.layer: a.reason for a in result.actions if a.what == "left alone"} == {
        "conv": "it has no zeros",
        "fc2": "it has no zeros",
    }


def refined_existing(masked, teacher, **options):
    return Dsnot(base="existing", targets=list(LAYERS), threshold=0.0, **options).execute(
        masked, Context(calibration=images(), teacher=teacher)
    )


def test_on_top_of_updated_weights_kept_ones_keep_their_new_values():
    dense = mixed()
    pruned = Sparsegpt(targets=["fc1"])(dense, calibration=images())
    # SparseGPT leaves so little of the mean that any trade goes past it: no sign test here.
    result = refined_existing(pruned, dense, same_sign=False, cycles=3)
    old, new, first = flat(pruned, "fc1"), flat(result.program, "fc1"), flat(dense, "fc1")
    assert result.metrics["trades"] > 0
    stayed, back = (old != 0) & (new != 0), (old == 0) & (new != 0)
    assert torch.equal(new[stayed], old[stayed])
    assert torch.equal(new[back], first[back])
    assert not torch.equal(new[stayed], first[stayed])


def test_sparsegpt_with_updates_is_another_start():
    dense = mixed()
    plain = refined(dense, base="sparsegpt")
    moved = refined(dense, base="sparsegpt", update=True)
    kept = (flat(plain.program, "fc1") != 0) & (flat(moved.program, "fc1") != 0)
    assert not torch.equal(flat(plain.program, "fc1")[kept], flat(moved.program, "fc1")[kept])
    assert bool(((flat(moved.program, "fc1") != 0).sum(1) == 16).all())


def test_rescaled_weights_are_not_the_originals():
    dense = mixed()
    masked = Magnitude(targets=["fc1"])(dense)
    state = dict(masked.state)
    state["fc1.weight"] = torch.nn.Parameter(3 * state["fc1.weight"].detach())
    with pytest.raises(ArgumentError, match="its kept weights are not the original's"):
        Dsnot(base="existing", targets=["fc1"])(
            masked.replace(state=state), calibration=images(), teacher=dense
        )


def test_refusals():
    with pytest.raises(ArgumentError, match="the mask is there already"):
        Dsnot(base="existing", sparsity=0.5)
    with pytest.raises(ArgumentError, match="the mask is there already"):
        Dsnot(base="existing", pattern="2:4")
    with pytest.raises(ArgumentError, match="only the base sparsegpt updates"):
        Dsnot(update=True)
    masked = Magnitude()(mixed())
    with pytest.raises(ArgumentError, match="the original program has the same zeros"):
        Dsnot(base="existing")(masked, calibration=images())
