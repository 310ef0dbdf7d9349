"""Images out of a classifier: P25's checks, P72's, and that a killed run goes on."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models import stripes
from torch import Tensor

from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.synthesis.images import batch_sizes, classes_in_turn, synthesize
from graphwright.ir.synthesis.options import SynthesisOptions, WeightAdjust
from graphwright.ir.synthesis.statistics import Observed, distances_per_norm, norms_of

SHORT = {"iterations": 8, "batch": 8}


def made(samples: int = 16, context: Context | None = None, start=None, **options):
    chosen = SynthesisOptions(**{**SHORT, **options})
    return synthesize(stripes.program(), samples, chosen, context or Context(), start)


@cache
def long() -> tuple[Tensor, Tensor]:
    options = SynthesisOptions(iterations=150, batch=40, min_area=0.9)
    return synthesize(stripes.program(), 40, options, Context())


def test_images_are_nearer_to_the_data_than_noise_at_every_norm():
    """Crops of 8 pixels that are enlarged again are smooth, which images then make up for: so they
    are large here."""
    found = distances_per_norm(stripes.program(), long()[0])
    noise = distances_per_norm(stripes.program(), torch.randn(40, 3, 8, 8))
    assert len(found) == 3
    assert all(found[name] < 0.5 * noise[name] for name in found), (found, noise)


def test_the_model_sees_the_classes_that_images_are_made_for():
    images, labels = long()
    with torch.no_grad():
        seen = stripes.program()(images).argmax(-1)
    assert float((seen == labels).float().mean()) > 0.95
    assert torch.bincount(labels).tolist() == [10, 10, 10, 10]


def test_pixels_stay_within_0_and_1():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    images, _ = made(mean=mean, std=std, lr=2.0)
    pixels = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert float(pixels.min()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.max()) == pytest.approx(1, abs=1e-6)


def test_a_declared_range_is_kept():
    program = stripes.program()
    (spec,) = program.signature.inputs
    bounded = spec.__class__(spec.name, spec.dtype, spec.shape, (-1.0, 0.5))
    signature = program.signature.__class__(
        (bounded,), program.signature.outputs, program.signature.structure, program.signature.dims
    )
    options = SynthesisOptions(**SHORT, lr=1.0)
    images, _ = synthesize(program.replace(signature=signature), 8, options, Context())
    assert (float(images.min()), float(images.max())) == (-1.0, 0.5)


def test_one_iteration_is_a_step_of_adam_down_the_loss():
    """The first step against the whole formula, written out with autograd on the model."""
    start = stripes.images(8, seed=7)
    found, _ = made(8, start=start, iterations=1, flip=False, jitter=0, curriculum="step")
    model, x = stripes.trained(), start[0].clone().requires_grad_()
    values: list[Tensor] = []
    norms = [m for m in model if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [n.register_forward_pre_hook(lambda _, args: values.append(args[0])) for n in norms]
    loss = torch.nn.functional.cross_entropy(model(x), start[1])
    for hook in hooks:
        hook.remove()
    for factor, value, norm in zip((10, 1, 1), values, norms, strict=True):
        mean = value.mean((0, 2, 3)) - norm.running_mean
        variance = value.var((0, 2, 3), correction=0) - norm.running_var
        loss = loss + 0.05 * factor * (mean.norm() + variance.norm())
    (gradient,) = torch.autograd.grad(loss, x)
    # Adam's first step is lr times the sign, where the gradient is not tiny; the view of this
    # iteration is the whole image in most draws, and then nothing else is in the way
    moved = (start[0] - found) / 0.1
    clear = gradient.abs() > 1e-6
    assert float((moved[clear] - gradient[clear].sign()).abs().max()) < 0.02


def test_two_runs_make_the_same_images_and_another_seed_others():
    first, again, other = made(), made(), made(context=Context(seed=1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    made(8)
    assert torch.equal(torch.get_rng_state(), before)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [21, 66])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, at):
    """Two batches with two rounds of 22 iterations each: killed in the first and in the second."""
    adaptive = {"step": "adaptive", "loss_weight": "adaptive"}
    adjust = WeightAdjust(steps=2)
    options = {"iterations": 22, "batch": 4, "weight_adjust": adjust, **adaptive}
    whole = made(8, context=Context(), **options)
    seen: list[int] = []

    def say(text: str, done: int, total: int) -> None:
        seen.append(done)
        if done >= at:
            raise _Killed

    context = Context(work=tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(_Killed):
        made(8, context=context.replace(progress=say), **options)
    first, seen = len(seen), []
    again = made(
        8, context=context.replace(progress=lambda text, done, total: seen.append(done)), **options
    )
    assert torch.equal(again[0], whole[0])
    assert first + len(seen) <= 4 * 3 + 1  # three looks a round; one was lost
    seen.clear()
    made(8, context=context.replace(progress=lambda *args: seen.append(1)), **options)
    assert seen == []  # finished work is not done again


def test_a_teacher_that_is_the_model_changes_nothing():
    start = stripes.images(16, seed=7)
    plain = made(start=start, milestone=0.0)
    same = made(start=start, milestone=0.0, weight_adjust=WeightAdjust(rho=0.0))
    assert torch.equal(plain[0], same[0])


def test_teachers_of_their_own_make_batches_differ_more():
    """Images of one class from two batches, from the same start: by the model's features."""
    program = stripes.program()
    one = stripes.images(8, seed=7)
    start = (torch.cat([one[0], one[0]]), torch.cat([one[1], one[1]]))
    before = {name: tensor.clone() for name, tensor in program.state.items()}

    def apart(rho: float) -> float:
        options = {"iterations": 40, "milestone": 0.0, "jitter": 0, "flip": False}
        images, _ = made(
            start=start, weight_adjust=WeightAdjust(rho=rho), variance_weight=11.0, **options
        )
        observed = Observed(program, norms_of(program), torch.device("cpu"))
        with torch.no_grad():
            features = observed(images)[1][-1].mean((2, 3))
        return float((features[:8] - features[8:]).norm(dim=1).mean())

    assert apart(1.0) > apart(0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state.items())


@pytest.mark.parametrize("options", [{"step": "adaptive"}, {"loss_weight": "adaptive"}])
def test_adaptive_steps_make_other_images_of_the_same_kind(options):
    plain, labels = made(8, iterations=60, flip=False)
    found, same = made(8, iterations=60, flip=False, **options)
    assert torch.equal(labels, same)
    assert not torch.equal(found, plain)
    with torch.no_grad():
        seen = stripes.program()(found).argmax(-1)
    assert float((seen == labels).float().mean()) > 0.9


def test_batches_are_as_even_as_can_be():
    assert batch_sizes(10, 4, None) == [4, 3, 3]
    assert batch_sizes(100, 100, None) == [100]
    assert batch_sizes(10, 100, 4) == [4, 4, 4]


def test_classes_come_in_turn_and_in_another_order_every_time():
    found = classes_in_turn(35, 10, torch.Generator().manual_seed(0))
    assert [sorted(found[i : i + 10].tolist()) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert found[:10].tolist() != found[10:20].tolist()
    assert len(found) == 35


def test_a_program_of_a_fixed_batch_gets_as_many_images_as_asked_for():
    program = stripes.traced(stripes.trained(), batch=False)
    images, labels = synthesize(program, 6, SynthesisOptions(iterations=2), Context())
    assert images.shape == (6, 3, 8, 8)
    assert labels.shape == (6,)


def test_normalization_of_other_channels_is_refused():
    with pytest.raises(ModelError, match="mean has 1 values, and an image of input 'x' 3 channels"):
        made(mean=(0.5,), std=(0.5,))
