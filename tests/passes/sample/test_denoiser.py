"""sample.denoiser: D and E of a network's output, for every parameterization, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ContractError, ModelError
from graphwright.ir.sampling.record import Denoiser

CHAIN = ("denoiser", [("sample.denoiser", {"unconditional": {"label": 4}})])


@pytest.fixture(scope="module")
def network() -> gw.Program:
    return denoisers.conv()


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "score", "flow", "edm"])
def test_data_and_noise(network: gw.Program, kind: str) -> None:
    schedule = {"flow": {"kind": "flow"}, "edm": {"kind": "edm", "time": "c_noise"}}.get(kind, {})
    made = gw.passes.sample.Denoiser(parameterization=kind, schedule=schedule)(network)
    x, time, label = network.examples
    a = torch.tensor([1.0, 1.0] if kind == "edm" else [0.6, 0.25])
    s = torch.tensor([2.0, 0.5] if kind == "edm" else [0.4, 0.75] if kind == "flow" else [0.8, 0.9])
    found = made(x, time, label, a, s)
    a, s = a[:, None, None, None], s[:, None, None, None]
    read = x / (s**2 + 0.25).sqrt() if kind == "edm" else x
    out = network(read, time, label)
    wanted = {
        "epsilon": lambda: (x - s * out) / a,
        "x0": lambda: out,
        "v": lambda: (a * x - s * out) / (a**2 + s**2),
        "score": lambda: (x + s**2 * out) / a,
        "flow": lambda: x - s * out,
        "edm": lambda: 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * out,
    }[kind]()
    torch.testing.assert_close(found["denoised"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a * found["denoised"] + s * found["noise"], x, rtol=1e-4, atol=1e-5)
    record = Denoiser.of(made)
    assert record is not None
    assert Denoiser.from_json(record.to_json()) == record
    assert record.conditions == {"label": None}


def test_a_wrong_formula_breaks_the_contract(
    network: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.passes.sample import denoiser as module

    real = module.canonical
    monkeypatch.setattr(module, "canonical", lambda *a: tuple(1.001 * t for t in real(*a)))
    step = gw.passes.sample.Denoiser()
    made = step.execute(network, gw.Context()).program
    monkeypatch.setattr(module, "canonical", real)
    from graphwright.ir.check.verify import check_contract

    with pytest.raises(ContractError, match=r"the output 'denoised' is off by 0\.001"):
        check_contract(network, made, step.promise())


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"sample": "image"}, ModelError, "no input 'image'"),
        ({"conditions": ["text"]}, ModelError, "no input 'text'"),
        ({"unconditional": {"timestep": 0}}, ModelError, "'timestep' of `unconditional`"),
        ({"sample": "timestep", "time": "label"}, ModelError, "the output has the shape"),
        ({"parameterization": "flow"}, ArgumentError, "a = 1 - t, not on table"),
        ({"parameterization": "edm"}, ArgumentError, "a = 1, not on table"),
        ({"scheduler": "nowhere.json"}, ArgumentError, "no scheduler's configuration"),
        ({"solver": "pndm"}, ArgumentError, "no solver named"),
    ],
)
def test_refusals(network: gw.Program, options: dict[str, Any], kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        gw.passes.sample.Denoiser(**options)(network)
