"""Weights of recurrent layers, bags, bilinear layers, einsums and transposed convolutions as codes.

No method calibrates them: every pass that makes codes rounds them to nearest, and says so.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.layers.kinds import STORED
from graphwright.ir.layers.products import weight_node, weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.stored.read import is_coded

quantize = gw.passes.quantize


class Net(nn.Module):
    """Every kind of layer that no method calibrates, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(32, 16), nn.RNN(16, 16)
        self.cell, self.long = nn.GRUCell(16, 16), nn.LSTMCell(16, 16)
        self.pair = nn.Bilinear(16, 16, 16)
        self.mix = nn.Parameter(torch.randn(16, 8, 16) / 4)
        self.up = nn.ConvTranspose1d(8, 8, 4, 2, 1)
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.rnn(self.gru(self.lstm(x)[0])[0])[0][:, -1]
        x, _ = self.long(self.cell(x))
        x = self.up(torch.einsum("bi,ijk->bjk", self.pair(x, x), self.mix))
        return self.out(x) + self.bag(ids)[:, None]


SEVERAL = [
    "mix",
    *(f"lstm.weight_{p}_l{n}{d}" for p in ("ih", "hh") for n in (0, 1) for d in ("", "_reverse")),
    *(f"{m}.weight_{p}_l0" for m in ("gru", "rnn") for p in ("ih", "hh")),
    *(f"{m}.weight_{p}" for m in ("cell", "long") for p in ("ih", "hh")),
]
WEIGHTS = {
    **{name: name for name in SEVERAL}, **{f"{m}.weight": m for m in ("bag", "pair", "up")}
}  # fmt: skip
"""Name of every such parameter, and of its layer: a call of several weights has several."""


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def program(net: nn.Module) -> gw.Program:
    example = {"x": torch.randn(3, 5, 16), "ids": torch.randint(0, 50, (3, 7))}
    return gw.trace(net, example, {"x": {0: "batch"}, "ids": {0: "batch"}})


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(8, 5, 16, generator=generator),
            "ids": torch.randint(0, 50, (8, 7), generator=generator),
        }
        for _ in range(count)
    ]


PASSES: dict[str, tuple[Any, float]] = {
    "rtn": (quantize.Rtn(bits=8, block=16), 0.01),
    "gptq": (quantize.Gptq(bits=8, block=16), 0.01),
    "awq": (quantize.Awq(bits=8, block=16, insert_scales=False), 0.01),
    "nf4": (quantize.Nf4(block=16), 0.2),
    "fp8": (quantize.Fp8(activations="none", embeddings=True), 0.06),
}
"""The passes, and the largest relative error of a weight."""


@pytest.mark.parametrize("name", PASSES)
def test_every_weight_becomes_codes_and_is_what_they_say(
    name: str, net: nn.Module, program: gw.Program, tmp_path: Path
) -> None:
    method, largest = PASSES[name]
    result = method.execute(program, Context(calibration=batches()))
    found = {x.name: x for x in layers(result.program) if x.kind in STORED}
    assert set(found) == set(WEIGHTS.values())
    assert all(is_coded(weight_node(x)) for x in found.values())
    assert {a.layer for a in result.actions if a.changed} == {*found, "out"}
    bytes_left = sum(t.nbytes for t in result.program.state.values())
    assert bytes_left < 0.45 * sum(t.nbytes for t in program.state.values())
    # torch's own modules on the rebuilt weights give what the program gives
    rebuilt = copy.deepcopy(net)
    state = dict(rebuilt.named_parameters())
    for parameter, layer in WEIGHTS.items():
        value = weight_value(result.program, found[layer])
        error = float((value - state[parameter].detach()).norm() / state[parameter].detach().norm())
        assert 0 < error < largest
        state[parameter].data.copy_(value)
    by_name = {x.name: x for x in layers(result.program)}
    state["out.weight"].data.copy_(weight_value(result.program, by_name["out"]))
    for given in batches(2):
        torch.testing.assert_close(result.program(**given), rebuilt(**given), atol=2e-6, rtol=1e-5)
    result.program.save(tmp_path / "p.pt2")
    again = gw.load(tmp_path / "p.pt2")
    assert torch.equal(again(**given), result.program(**given))


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
@pytest.mark.parametrize("name", ["rtn", "nf4", "int8"])
def test_backends_keep_the_codes(name: str, backend: str, program: gw.Program) -> None:
    method = quantize.Int8() if name == "int8" else PASSES[name][0]
    coded = method.execute(program, Context()).program
    compiled = gw.lower(coded, backend)
    # products of weights in blocks and int8 round activations as they come
    is_sharp = backend == "triton" or name == "nf4"
    for given in batches(2):
        with torch.no_grad():
            found, expected = compiled(*given.values()), coded(**given)
            error = float((found - expected).norm() / expected.norm())
        assert error < (1e-5 if is_sharp else 0.02)


def test_a_refused_weight_leaves_the_others_of_its_call(net: nn.Module) -> None:
    spoiled = copy.deepcopy(net)
    spoiled.get_parameter("gru.weight_hh_l0").data[0, 0] = torch.inf
    given = batches(1)[0]
    program = gw.trace(spoiled, given)
    result = quantize.Rtn(bits=8, block=16, targets=["gru.*"]).execute(program, Context())
    said = {a.layer: (a.changed, a.reason) for a in result.actions}
    assert said["gru.weight_hh_l0"] == (False, "its weight holds NaN or infinity")
    assert said["gru.weight_ih_l0"][0]


def test_int8_measures_each_call_on_all_its_weights(program: gw.Program, net: nn.Module) -> None:
    result = quantize.Int8().execute(program, Context())
    errors = {a.layer: a.what.rpartition(" ")[2] for a in result.actions if "relative" in a.what}
    assert len({errors[name] for name in SEVERAL if name.startswith("lstm")}) == 1
    rebuilt = copy.deepcopy(net).get_submodule("lstm")
    for layer in layers(result.program):
        if layer.kind == "lstm":
            parameter = rebuilt.get_parameter(layer.name.removeprefix("lstm."))
            parameter.data.copy_(weight_value(result.program, layer))
    x = program.examples[0]
    with torch.no_grad():
        exact, other = net.get_submodule("lstm")(x)[0], rebuilt(x)[0]
    expected = float((other - exact).norm() / exact.norm())
    assert float(errors["lstm.weight_ih_l0"]) == pytest.approx(expected, rel=0.02)
