"""sample.cfg: the formula on two runs, diffusers' guider, one evaluation of twice the rows."""

from __future__ import annotations

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.choice import variant
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.variants import FULL

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.cfg", {"guidance_scale": 3.0})])


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.conv_denoiser(parameterization="v")


def both(program: gw.Program, inputs: tuple[torch.Tensor, ...]) -> tuple[dict, dict]:
    """With the label, and with the one that stands for none."""
    x, t, label, a, s = inputs
    return program(x, t, label, a, s), program(x, t, torch.full_like(label, 4), a, s)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_it_is_the_guider_of_diffusers(denoiser: gw.Program, rescale: float) -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    from graphwright.ir.sampling.parameterization import output_of

    made = gw.passes.sample.Cfg(guidance_scale=3.0, guidance_rescale=rescale)(denoiser)
    peer = ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=rescale)
    peer.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(500))
    for rows in (1, 2, 3):
        inputs = tuple(x.repeat(2, *[1] * (x.dim() - 1))[:rows] for x in denoiser.examples)
        x, a, s = inputs[0], *(level[:, None, None, None] for level in inputs[3:])
        outs = [output_of("v", p["denoised"], x, a, s) for p in both(denoiser, inputs)]
        wanted = peer.forward(*outs).pred
        found = made(*inputs, torch.tensor(3.0))
        mine = output_of("v", found["denoised"], x, a, s)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_one_call_of_the_network(denoiser: gw.Program) -> None:
    made = gw.passes.sample.Cfg()(denoiser)
    count = [
        sum(node.target is torch.ops.aten.conv2d.default for node in program.graph.nodes)
        for program in (denoiser, made)
    ]
    assert count[0] == count[1] == 4
    assert not any("chunk" in str(node.target) for node in made.graph.nodes)
    scales = [made(*made.examples[:-1], torch.tensor(w))["denoised"] for w in (0.0, 1.0)]
    with_label, without = both(denoiser, denoiser.examples)
    torch.testing.assert_close(scales[0], without["denoised"])
    torch.testing.assert_close(scales[1], with_label["denoised"], rtol=1e-4, atol=1e-5)


def test_negatives_are_inputs_where_no_number_stands_for_them() -> None:
    program = denoisers.conv_denoiser(unconditional={})
    made = gw.passes.sample.Cfg()(program)
    names = [spec.name for spec in made.signature.inputs]
    assert names == ["sample", "timestep", "label", "alpha", "sigma", "negative_label",
                     "guidance_scale"]  # fmt: skip


def test_refusals(denoiser: gw.Program) -> None:
    made = gw.passes.sample.Cfg()(denoiser)
    with pytest.raises(ModelError, match=r"sample.cfg has put guidance around"):
        gw.passes.sample.Cfg()(made)
    with pytest.raises(ModelError, match="nothing says that this program is a denoiser"):
        gw.passes.sample.Cfg()(denoisers.conv())
    with pytest.raises(ModelError, match="no condition to guide by"):
        gw.passes.sample.Cfg()(denoisers.conv_denoiser(conditions=[], unconditional={}))
    with pytest.raises(ArgumentError, match=r"stop \(0.2\) has to be above start \(0.5\)"):
        gw.passes.sample.Cfg(start=0.5, stop=0.2)
    net = denoisers.ConvDenoiser().eval()
    examples = denoisers.conv().examples
    fixed = gw.passes.sample.Denoiser(unconditional={"label": 4})(gw.trace(net, examples))
    with pytest.raises(ModelError, match="the batch is fixed at 2"):
        gw.passes.sample.Cfg()(fixed)


def test_an_interval_ends_at_its_step_whatever_floats_make_of_it(denoiser: gw.Program) -> None:
    made = gw.passes.sample.Cfg(stop=0.29)(denoiser)  # 0.29 * 100 is 28.999999999999996
    sampler = Sampler.of(made)
    plan = sampler.plan(2, {"label": torch.tensor([0, 1])}, steps=100)
    names = [variant(sampler.record, plan, i, {}) for i in range(100)]
    assert names.count(FULL) == 29
