"""`optimize` on a denoiser: a bundle, held to the network before compression; specs refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.check.verify import Checker
from graphwright.ir.errors import SpecError
from graphwright.ir.sampling.sampler import Sampler

SPEC = """
version: 1
passes:
  - quantize.rtn: {block: 16, targets: ["middle", "last"]}
  - sample.denoiser: {unconditional: {label: 4}, solver: dpmpp_2m, grid: {spacing: multistep}}
  - sample.cfg: {guidance_scale: 2.0, stop: 0.6}
lower: [onnxruntime]
"""


def test_a_quantized_denoiser_becomes_a_bundle(tmp_path: Path) -> None:
    network = denoisers.conv()
    network.save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert [row["id"] for row in done.report["passes"]][-1] == "sample.cfg"
    assert done.report["latency"] == []
    # what quantization lost is seen behind the passes that restated the program
    assert 0.001 < done.report["fidelity"]["relative"] < 0.3
    bundle = gw.load(tmp_path / "out")
    noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"label": torch.tensor([0, 1, 3])}
    mine = bundle.sample(noise, given, steps=5)
    assert bundle.sampler.evaluations == 3 * 2 + 2
    wanted = Sampler.of(done.program).sample(noise, given, steps=5)
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("  - sample.denoiser", "  - sample.apg\n  - sample.denoiser", "nothing to do without"),
        ("  - sample.cfg", "  - sample.cfgpp\n  - sample.cfg", "cannot be in a chain with"),
        ("  - sample.cfg", "  - cleanup.fold_constants\n  - sample.cfg", "must come before"),
        ("[onnxruntime]", "[onnxruntime, triton]", "a bundle is of one backend"),
        ("lower:", "evaluate: {data: synthetic, metric: cosine}\nlower:", "a metric compares"),
        ("stop: 0.6", "stop: 0.6, start: 0.7", "has to be above start"),
    ],
)
def test_specs_that_cannot_be(tmp_path: Path, old: str, new: str, text: str) -> None:
    """Before a model is opened: there is none."""
    (tmp_path / "spec.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(SpecError, match=text):
        gw.optimize(tmp_path / "none.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")


def test_a_resumed_check_compares_with_the_restated_network() -> None:
    network = denoisers.conv()
    steps = [
        gw.passes.quantize.Rtn(block=16),
        gw.passes.sample.Denoiser(unconditional={"label": 4}),
        gw.passes.sample.Cfg(guidance_scale=2.0),
    ]
    straight, program = Checker(network), network
    for step in steps:
        program = step.execute(program, gw.Context()).program
        straight.accept(program, step.promise())
    resumed = Checker(network)
    resumed.resume(program, [step.promise() for step in steps])
    assert resumed.total() == straight.total()
    assert 0.001 < resumed.total().relative < 0.5


def test_features_that_later_steps_take_over_are_no_outputs(tmp_path: Path) -> None:
    denoisers.conv().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(
        "version: 1\npasses:\n  - quantize.int8: {}\n"
        "  - sample.denoiser: {unconditional: {label: 4}}\n"
        "  - sample.cfg: {stop: 0.5}\n  - sample.reuse: {modules: [middle]}\nlower: [triton]\n"
    )
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert 0 < done.report["fidelity"]["relative"] < 0.05
    bundle = gw.load(tmp_path / "out")
    mine, wanted = bundle(*done.program.examples), done.program(*done.program.examples)
    assert list(mine) == list(wanted) == ["denoised", "noise"]
    torch.testing.assert_close(mine["denoised"], wanted["denoised"])


@pytest.mark.parametrize("mode", ["initialize", "full", None])
def test_ranges_of_activations_are_those_of_all_rows_of_a_call(mode: str | None) -> None:
    """Dynamic int8 joins the rows that are asked together; the check of the pass says the same."""
    rounded = gw.passes.quantize.Int8(embeddings=False)(denoisers.token())
    program = gw.passes.sample.Denoiser(unconditional={"label": 4})(rounded)
    made = (
        gw.passes.sample.Stream(steps=(359, 99), guidance=mode) if mode else gw.passes.sample.Cfg()
    )(program)
    assert made.facts["sampling"]["guidance"] is not None
