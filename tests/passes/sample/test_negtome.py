"""sample.negtome: the paper's formula by loops, both halves on their own, early steps alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import denoisers
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError, SpecError
from graphwright.ir.sampling import tokens as tokens_module
from graphwright.ir.sampling.parameterization import canonical
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("token_denoiser", [DENOISER, ("sample.negtome", {"threshold": 0.2})])
GIVEN = {"label": torch.tensor([0, 1, 3])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.token_denoiser()


def noise(rows: int = 3) -> Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def by_loops(
    strength: float, threshold: float, match: str = "paper", skipped: int = 0
) -> Callable[[Tensor], Tensor]:
    """The push of every token, one after the other."""

    def push(tokens: Tensor) -> Tensor:
        made = tokens.clone()
        first = tokens[0, skipped:]
        for row in range(len(tokens)):
            own = tokens[row, skipped:]
            for i in range(len(own)):
                if match == "paper":
                    likeness = [cosine(own[i], first[j]) for j in range(len(first))]
                else:  # the token of the first sample at i asks, and a place is taken from it
                    likeness = [cosine(own[j], first[i]) for j in range(len(own))]
                best = max(range(len(likeness)), key=likeness.__getitem__)
                if likeness[best] > threshold:
                    made[row, skipped + i] = (1 + strength) * own[i] - strength * first[best]
        return made

    return push


def cosine(u: Tensor, v: Tensor) -> float:
    return float(u @ v / (u.norm() * v.norm()))


def wanted(behind: Any, x: Tensor, t: Tensor, label: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """D of the network itself with something behind its attention, in float64."""
    net = denoisers.token_net().double()
    net.behind = behind
    with torch.no_grad():
        out = net(x.double(), t.double(), label)
    return canonical(
        "epsilon", out, x.double(), *(v.double()[:, None, None, None] for v in (a, s))
    )[0]


def in_double(program: gw.Program, inputs: tuple[Tensor, ...]) -> Tensor:
    from graphwright.ir.check.precision import run_in_double

    return run_in_double(program, inputs)[0]


def examples(rows: int = 3) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    levels = torch.rand(2, rows, generator=g) / 2 + 0.25
    return noise(rows), 999 * levels[0], torch.arange(rows) % 4, *levels


@pytest.mark.parametrize("match", ["paper", "released"])
@pytest.mark.parametrize("skipped", [0, 5])
@pytest.mark.parametrize("chunk", [1024, 3])
def test_it_is_the_loop_over_tokens(
    denoiser: gw.Program, monkeypatch: Any, match: str, skipped: int, chunk: int
) -> None:
    monkeypatch.setattr(tokens_module, "CHUNK", chunk)
    options = {"threshold": 0.3, "strength": 0.7, "match": match, "skipped_tokens": skipped}
    made = gw.passes.sample.Negtome(**options)(denoiser)
    for rows in (1, 2, 5):
        inputs = examples(rows)
        found = in_double(made, inputs)
        right = wanted(by_loops(0.7, 0.3, match, skipped), *inputs)
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    others = wanted(None, *inputs)
    assert float((found - others)[1:].abs().max()) > 0.01
    if match == "paper":  # its own token is the most similar one
        torch.testing.assert_close(found[0], others[0], rtol=1e-10, atol=1e-10)


def test_a_threshold_that_nothing_reaches_changes_nothing(denoiser: gw.Program) -> None:
    made = gw.passes.sample.Negtome(threshold=1.0)(denoiser)
    inputs = examples()
    torch.testing.assert_close(in_double(made, inputs), in_double(denoiser, inputs))


def test_matched_tokens_are_less_alike() -> None:
    g = torch.Generator().manual_seed(0)
    first = torch.randn(16, 8, generator=g)
    other = first + 0.5 * torch.randn(16, 8, generator=g)
    moved = by_loops(0.9, 0.65)(torch.stack([first, other]))[1]
    pairs = [(i, max(range(16), key=lambda j: cosine(other[i], first[j]))) for i in range(16)]
    near = [(i, j) for i, j in pairs if cosine(other[i], first[j]) > 0.65]
    assert len(near) > 8
    assert all(cosine(moved[i], first[j]) < cosine(other[i], first[j]) for i, j in near)


def test_rows_with_and_without_the_condition_have_their_own_first(denoiser: gw.Program) -> None:
    guided = gw.passes.sample.Cfg(guidance_scale=3.0)(denoiser)
    made = gw.passes.sample.Negtome(threshold=0.3, strength=0.7)(guided)
    for rows in (1, 2, 5):
        x, t, label, a, s = examples(rows)
        push = by_loops(0.7, 0.3)
        one = wanted(push, x, t, label, a, s)
        other = wanted(push, x, t, torch.full_like(label, 4), a, s)
        found = in_double(made, (x, t, label, a, s, torch.tensor(3.0)))
        torch.testing.assert_close(found, other + 3 * (one - other), rtol=1e-9, atol=1e-9)


def test_later_steps_are_those_of_the_denoiser(denoiser: gw.Program) -> None:
    guided = gw.passes.sample.Cfg(guidance_scale=2.0, stop=0.5)(denoiser)
    made = Sampler.of(gw.passes.sample.Negtome(threshold=0.3, stop=0.3)(guided))
    plain = Sampler.of(guided)
    x = made.sample(noise(), GIVEN, steps=8)
    assert made.calls == {"full": 3, "full_still": 1, "conditioned_still": 4}
    assert made.evaluations == 4 * 2 + 4
    assert float((x - plain.sample(noise(), GIVEN, steps=8)).abs().max()) > 0.01
    mine, own = (s.plan(3, GIVEN, steps=8) for s in (made, plain))
    for i in range(3, 8):
        assert torch.equal(made.step(mine, i, x, {})[0], plain.step(own, i, x, {})[0])
    few = Sampler.of(gw.passes.sample.Negtome(threshold=0.3, stop=0.1)(denoiser))
    few.sample(noise(), GIVEN, steps=4)
    assert few.calls == {"full": 1, "full_still": 3}


def test_steps_that_take_over_push_too(denoiser: gw.Program) -> None:
    made = gw.passes.sample.Negtome(threshold=0.3, stop=0.5)(denoiser)
    every = gw.passes.sample.Reuse(modules=["enter"], refresh=[0])(made)
    kept = Sampler.of(every)
    kept.sample(noise(), GIVEN, steps=4)
    assert kept.calls == {"full": 1, "full_shallow": 1, "full_still_shallow": 2}
    always = Sampler.of(gw.passes.sample.Reuse(modules=["enter"], interval=1)(made))
    right = Sampler.of(made).sample(noise(), GIVEN, steps=4)
    assert torch.equal(always.sample(noise(), GIVEN, steps=4), right)


SPEC = """
version: 1
passes:
  - sample.denoiser: {unconditional: {label: 4}, grid: {spacing: leading}}
  - sample.cfg: {guidance_scale: 2.0}
  - sample.negtome: {threshold: 0.3, stop: 0.5}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle(tmp_path: Path) -> None:
    denoisers.token().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    for rows in (2, 3):
        given = {"label": GIVEN["label"][:rows]}
        mine = bundle.sample(noise(rows), given, steps=4)
        assert bundle.sampler.calls == {"full": 2, "full_still": 2}
        right = Sampler.of(done.program).sample(noise(rows), given, steps=4)
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_attentions_that_cannot_push_are_named(denoiser: gw.Program) -> None:
    run = gw.passes.sample.Negtome(threshold=0.3).execute(denoiser, gw.Context())
    said = [(action.changed, action.reason) for action in run.actions]
    assert said == [(True, ""), (False, "its keys do not come from the sample")]
    for options, text in [
        ({"min_tokens": 17}, "it is over 16 tokens, fewer than min_tokens"),
        ({"skipped_tokens": 16}, "it is over 16 tokens, no more than skipped_tokens"),
        ({"modules": ["up_blocks*"]}, "no attention in up_blocks"),
    ]:
        with pytest.raises(ModelError, match=r"can push its tokens") as error:
            gw.passes.sample.Negtome(**options)(denoiser)
        assert text in str(error.value) + str(error.value.details)


def test_refusals(denoiser: gw.Program, tmp_path: Path) -> None:
    made = gw.passes.sample.Negtome()(denoiser)
    sampler = Sampler.of(made)
    with pytest.raises(ArgumentError, match="away from the first of the batch, and there is one"):
        sampler.sample(noise(1), {"label": torch.tensor([0])}, steps=4)
    pushed = gw.passes.sample.Negtome()(denoiser, check=False)
    with pytest.raises(ModelError, match="makes some steps differ here, and a tick does all"):
        gw.passes.sample.Stream(steps=[900, 100])(pushed)
    with pytest.raises(ModelError, match="nothing says that this program is a denoiser"):
        gw.passes.sample.Negtome()(denoisers.token())
    alone = gw.trace(denoisers.token_net(), tuple(x[:1] for x in denoisers.token().examples))
    fixed = gw.passes.sample.Denoiser(unconditional={"label": 4})(alone)
    with pytest.raises(ModelError, match="the batch is fixed at 1"):
        gw.passes.sample.Negtome()(fixed)
    for other in ("feynman_kac", "linear_guidance"):
        (tmp_path / "spec.yaml").write_text(SPEC.replace("sample.cfg: {guidance_scale: 2.0}",
                                                         f"sample.{other}: {{}}"))  # fmt: skip
        with pytest.raises(SpecError, match="cannot be in a chain with"):
            gw.optimize(tmp_path / "none.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
