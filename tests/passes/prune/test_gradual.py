"""prune.gradual: the course, the zeros of earlier rounds, rewinding, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import digits
from models.every_pass import TUNE
from models.masked_nets import images, mixed

from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune.gradual import Gradual
from graphwright.passes.prune.magnitude import Magnitude

CHAIN = ("text", [("prune.gradual", {"sparsity": 0.5, "rounds": 2, "tune": TUNE})])

WEIGHTS = ("conv.weight", "grouped.weight", "fc1.weight", "fc2.weight")
TUNE = {"steps": 3, "lr": 1e-2, "loss": "mse"}


def labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(x, torch.randn(len(x), 6, generator=generator)) for (x,) in images()]


def test_courses_by_hand() -> None:
    cubic = Gradual(sparsity=0.8, initial=0.2, rounds=4).options.course_of()
    expected = [0.8 - 0.6 * (1 - r / 4) ** 3 for r in (1, 2, 3, 4)]
    assert cubic == pytest.approx(expected)
    linear = Gradual(sparsity=0.8, rounds=4, course="linear").options.course_of()
    assert linear == pytest.approx([0.2, 0.4, 0.6, 0.8])
    left = 1 - np.array(Gradual(sparsity=0.488, rounds=3, course="exponential").options.course_of())
    np.testing.assert_allclose(left, [0.8, 0.64, 0.512], rtol=1e-12)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "mfac"])
def test_every_score_ends_at_the_sparsity(score: str) -> None:
    step = Gradual(sparsity=0.75, rounds=2, score=score, tune=TUNE)
    result = step.execute(mixed(), Context(training=labelled()))
    for name in WEIGHTS if score != "mfac" else ():  # all of its layers compete
        share = float((result.program.state[name] == 0).float().mean())
        assert share == pytest.approx(0.75, abs=0.03)
    assert result.metrics["sparsity"] == pytest.approx(0.75, abs=0.03)
    assert result.metrics["round_1_sparsity"] == pytest.approx(0.75 * 7 / 8, abs=0.03)


def test_zeros_only_grow_and_the_rest_trains() -> None:
    short = Gradual(sparsity=0.65625, rounds=1, tune=TUNE)  # the first round of the other one
    full = Gradual(sparsity=0.75, rounds=2, tune=TUNE)
    dense, data = mixed(), labelled()
    first, last = (s(dense, training=data, check=False) for s in (short, full))
    for name in WEIGHTS:
        assert not bool(((first.state[name] == 0) & (last.state[name] != 0)).any())
    assert not torch.equal(first.state["fc1.bias"], dense.state["fc1.bias"])


def test_rewinding_goes_on_from_the_given_weights() -> None:
    """With a learning rate of almost nothing the kept weights are those of the start."""
    tune = {**TUNE, "lr": 1e-12, "optimizer": "sgd"}
    dense = mixed()
    result = Gradual(sparsity=0.5, rounds=2, rewind="start", tune=tune).execute(
        dense, Context(training=labelled())
    )
    one_shot = Magnitude(sparsity=0.5)(dense, check=False)
    for name in WEIGHTS:
        torch.testing.assert_close(result.program.state[name], one_shot.state[name])
    moving = {**TUNE, "steps": 20, "lr": 0.05}
    found = Gradual(sparsity=0.5, rounds=1, rewind="start", tune=moving)
    other = found(dense, training=labelled(), check=False)
    same = (other.state["fc1.weight"] == 0) == (one_shot.state["fc1.weight"] == 0)
    assert not bool(same.all()), "the mask is that of the trained weights"


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match=r"initial 0\.5 is not below sparsity 0\.5"):
        Gradual(sparsity=0.5, initial=0.5)
    with pytest.raises(ArgumentError, match="scope has no part in score wanda"):
        Gradual(score="wanda", scope="row")
    with pytest.raises(ArgumentError, match="keeps its zeros"):
        Gradual(tune={"keep_zeros": False})


def test_targets_are_pruned_alone() -> None:
    step = Gradual(sparsity=0.5, rounds=1, targets=["fc1"], tune=TUNE)
    program = step(mixed(), training=labelled(), check=False)
    assert float((program.state["fc1.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert not bool((program.state["fc2.weight"] == 0).any())


def test_a_net_at_97_percent_recovers() -> None:
    """All but the first and the last layer, as usual; pruned alone it knows nothing any more."""
    program = digits.traced(digits.trained("vgg", epochs=5))
    targets = ["*", "!0", "!21"]
    alone = Magnitude(sparsity=0.97, targets=targets)(program, check=False)
    assert digits.accuracy(alone) < 0.5
    step = Gradual(sparsity=0.97, rounds=3, targets=targets, tune={"lr": 2e-3, "steps": 50})
    found = step(program, training=digits.training(program), check=False)
    assert digits.accuracy(found) > 0.95
