from __future__ import annotations

from typing import Any

import pytest
import torch
from models.every_pass import batches, traced
from torch import Tensor

import graphwright as gw
from graphwright.backends.triton.compiled import FusedModule
from graphwright.backends.triton.decoder.runner import StaticRunner
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.quantize.kv_cache import channel_scale

CHAIN = ("decoder", [("quantize.kv_cache", {})])

KvCache = gw.passes.quantize.KvCache


def quantized(**options: Any) -> gw.Program:
    context = Context(calibration=batches("decoder"))
    return KvCache(**options).execute(traced("decoder"), context).program


def stored(x: Tensor, bits: int, scale: Tensor | None) -> Tensor:
    """The formula in float64."""
    most = 2 ** (bits - 1) - 1
    step = x.double().abs().amax(-1, keepdim=True) / most if scale is None else scale.double()
    return (x.double() / step).round().clamp(-most, most) * step


def present(program: gw.Program) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(3))
    return dict(program(input_ids=ids))


@pytest.mark.parametrize(
    ("options", "keys", "values"),
    [({}, "channel", "token"), ({"bits": 4, "scales": "channel"}, "channel", "channel"),
     ({"bits": 4, "scales": "token"}, "token", "token")],
)  # fmt: skip
def test_the_first_cache_is_on_the_grid_of_the_formula(
    options: dict[str, Any], keys: str, values: str
) -> None:
    program = quantized(**options)
    before, after = present(traced("decoder")), present(program)
    for part, kind in (("key", keys), ("value", values)):
        name = f"kv_cache.past_{part}_0_scale"
        assert (name in program.state) == (kind == "channel")
        x, y = (found[f"present_{part}_0"] for found in (before, after))
        expected = stored(x, options.get("bits", 8), program.state.get(name))
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


def test_more_bits_lose_less() -> None:
    program = traced("decoder")
    lost = [
        measure(program, quantized(bits=bits), batches("decoder")).relative for bits in (16, 8, 4)
    ]
    assert 0 < lost[0] < 1e-3
    assert 4 * lost[0] < lost[1] < 0.02
    assert 4 * lost[1] < lost[2] < 0.3


def test_the_search_for_a_scale_never_loses_against_the_peak() -> None:
    tokens = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0))
    tokens[0, 0, 3] = 9.0
    peak = tokens.abs().amax(1)
    scale = channel_scale(peak, tokens, 4)

    def error(s: Tensor) -> Tensor:
        return (stored(tokens, 4, s) - tokens).square().sum(1)

    assert (error(scale) <= error(peak[:, None] / 7) * (1 + 1e-6)).all()
    assert error(scale)[0, 3] < 0.8 * error(peak[:, None] / 7)[0, 3]


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 1 / 4), ({"bits": 4, "scales": "token"}, 1 / 8), ({"bits": 16}, 1 / 2)],
)
def test_the_triton_artifact_stores_codes_and_gives_the_programs_logits(
    options: dict[str, Any], share: float
) -> None:
    compiled = gw.lower(quantized(**options), "triton")  # holds steps to the program
    assert isinstance(compiled, FusedModule)
    sizes = []
    for artifact in (compiled, gw.lower(traced("decoder"), "triton")):
        runner = artifact.runner()
        assert isinstance(runner, StaticRunner)
        runner.start(2, 128)
        runner.run(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 3]))
        sizes.append(runner.cache_bytes)
    scales = {8: 2, 4: 4}.get(options.get("bits", 8), 0) * 2 * 2 * 128 * 4
    assert sizes[0] == sizes[1] * share + scales


def test_a_second_time_is_refused() -> None:
    with pytest.raises(ModelError, match="it is quantized already"):
        KvCache(scales="token").execute(quantized(), Context())


def test_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a decoder with a cache"):
        KvCache(bits=16).execute(traced("text"), Context())


def test_scales_of_half_precision_are_refused() -> None:
    with pytest.raises(ArgumentError, match="scales have no part"):
        KvCache(bits=16, scales="token")


def test_onnx_runtime_rounds_and_says_that_it_saves_nothing() -> None:
    program = quantized(bits=4)
    compiled = gw.lower(program, "onnxruntime")  # held to the program at its own codes
    assert any("stored in floats" in line for line in compiled.notes["warnings"])
    prompt = [[1, 2, 3]]
    found = compiled.generate(prompt, max_new_tokens=4)[0].ids
    assert found == gw.lower(program, "triton").generate(prompt, max_new_tokens=4)[0].ids
