"""Chains of single parts: checked like the spec's own, at their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphwright.ir.errors import SpecError
from graphwright.specs import parse_spec
from graphwright.specs.spec import load_spec, write_lock

TEXT = """\
version: 1
calibration: {data: synthetic, samples: 4}
passes: [cleanup.canonicalize]
parts:
  text_encoder:
    passes: [{quantize.rtn: {bits: 8}}]
    calibration: {data: synthetic}
  unet:
    passes:
      - quantize.rtn: {bits: 4}
      - sample.denoiser
      - sample.cfg: {guidance_scale: 2.0}
  vae_decoder: {}
lower: [onnxruntime]
"""


def chains(spec):
    return {name: [call.id for call in part.passes] for name, part in spec.parts.items()}


def test_a_part_has_its_own_passes_and_what_it_does_not_say_of_the_spec():
    spec = parse_spec(TEXT)
    assert [call.id for call in spec.passes] == ["cleanup.canonicalize"]
    assert chains(spec) == {
        "text_encoder": ["quantize.rtn"],
        "unet": ["quantize.rtn", "sample.denoiser", "sample.cfg"],
        "vae_decoder": [],
    }
    assert spec.parts["unet"].passes[0].options == {"bits": 4}
    assert spec.parts["unet"].passes[0].line == 10
    assert spec.parts["unet"].calibration == spec.calibration
    assert spec.parts["text_encoder"].calibration.samples is None
    assert [len(chain) for chain in spec.chains] == [1, 1, 3, 0]


def test_the_lock_repeats_them(tmp_path: Path):
    spec = parse_spec(TEXT)
    write_lock(spec, {}, tmp_path / "spec.lock.yaml")
    again = load_spec(tmp_path / "spec.lock.yaml")
    assert chains(again) == chains(spec)
    for name, part in spec.parts.items():
        assert again.parts[name].calibration == part.calibration
    assert again.parts["unet"].passes[2].options["guidance_scale"] == 2.0


def test_an_override_reaches_into_a_part():
    spec = parse_spec(TEXT, overrides=["parts.unet.passes.sample.cfg.guidance_scale=5"])
    assert spec.parts["unet"].passes[2].options == {"guidance_scale": 5}
    with pytest.raises(SpecError, match=r"has no entry 'sample\.apg'"):
        parse_spec(TEXT, overrides=["parts.unet.passes.sample.apg.eta=1"])


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("sample.denoiser", "sample.denoisr",
         "11:9: parts.unet.passes[1]: no pass named 'sample.denoisr'"),
        ("guidance_scale: 2.0", "guidance_scale: -2.0",
         "12:38: parts.unet.passes[2].guidance_scale: expected 0 or more"),
        ("bits: 8", "bitts: 8", "6:30: parts.text_encoder.passes[0].bitts"),
        ("- sample.cfg: {guidance_scale: 2.0}", "- sample.cfg\n      - sample.apg",
         "13:9: parts.unet.passes[3]: sample.apg cannot be in a chain with sample.cfg"),
        ("calibration: {data: synthetic}", "calibration: {data: none.npz}",
         "7:25: parts.text_encoder.calibration.data: no file or folder 'none.npz'"),
        ("  vae_decoder: {}", "  vae_decoder: {pases: []}", "13:17: parts.vae_decoder.pases"),
        ("[onnxruntime]", "[onnxruntime, triton]", "14:22: lower[1]: a bundle is of one backend"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_at_its_place(old: str, new: str, line: str):
    with pytest.raises(SpecError) as found:
        parse_spec(TEXT.replace(old, new), name="s")
    assert len(found.value.problems) == 1
    assert str(found.value.problems[0]).startswith(f"s:{line}")


def test_code_in_a_part_is_refused_where_code_is():
    from graphwright.specs.code import refuse_code

    with pytest.raises(SpecError, match=r"nets:data: code that a run would import"):
        refuse_code(parse_spec(TEXT.replace("{data: synthetic}", "{data: 'nets:data'}")))


def test_stream_and_negtome_are_refused_before_a_model_is_opened():
    chain = "sample.cfg: {guidance_scale: 2.0}"
    text = TEXT.replace(chain, "sample.stream: {steps: [3, 1]}\n      - sample.negtome")
    with pytest.raises(SpecError, match=r"negtome cannot be in a chain with sample\.stream"):
        parse_spec(text)
