from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.passes.decompose.svd import Svd

CHAIN = ("text", [("decompose.svd", {"ratio": 0.5, "targets": ["kind:linear", "!head"]})])


def traced(net: nn.Module, *shape: int) -> gw.Program:
    torch.manual_seed(0)
    name = "input" if isinstance(net, nn.Sequential) else "x"
    return gw.trace(net.eval(), (torch.randn(*shape),), {name: {0: "batch"}})


class One(nn.Module):
    """A single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def pair(program: gw.Program) -> tuple[torch.Tensor, torch.Tensor]:
    return program.state["layer.u.weight"].detach(), program.state["layer.v.weight"].detach()


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_plain_error_is_the_tail_of_the_singular_values(rank: int) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(24, 20)
    made = Svd(rank=rank, weighting="none")(traced(One(layer), 4, 24))
    u, v = pair(made)
    assert u.shape == (20, rank)
    assert v.shape == (rank, 24)
    tail = torch.linalg.svdvals(layer.weight.detach().double())[rank:].norm()
    left = (layer.weight.detach().double() - u.double() @ v.double()).norm()
    torch.testing.assert_close(left, tail, rtol=1e-5, atol=0)
    assert torch.equal(made.state["layer.bias"], layer.bias)


def test_the_weighted_error_reaches_the_bound_of_eckart_and_young_on_the_data() -> None:
    torch.manual_seed(1)
    layer, rank = nn.Linear(24, 20), 5
    x = torch.randn(400, 24) @ torch.randn(24, 24).tril() * torch.linspace(0.05, 4, 24)
    program, batches = traced(One(layer), 4, 24), [{"x": part} for part in x.split(100)]
    weighted = Svd(rank=rank)(program, calibration=batches)
    plain = Svd(rank=rank, weighting="none")(program)
    exact = x.double() @ layer.weight.detach().double().t()

    def error(made: gw.Program) -> float:
        u, v = (each.double() for each in pair(made))
        return float((exact - x.double() @ (u @ v).t()).norm())

    bound = float(torch.linalg.svdvals(exact)[rank:].norm())
    assert error(weighted) == pytest.approx(bound, rel=1e-4)
    assert error(plain) > 1.2 * bound


def test_ranks_by_ratio_energy_and_layer() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    )
    program = traced(net, 4, 32)
    by_ratio = Svd(ratio=0.5, weighting="none")(program)
    assert by_ratio.state["0.v.weight"].shape[0] == int(0.5 * 32 * 64 / 96)
    assert by_ratio.state["2.v.weight"].shape[0] == int(0.5 * 64 * 64 / 128)
    by_energy = Svd(energy=0.6, weighting="none", targets=["2"])(program)
    s = torch.linalg.svdvals(net[2].weight.detach()).square()
    rank = by_energy.state["2.v.weight"].shape[0]
    assert s[:rank].sum() >= 0.6 * s.sum() > s[: rank - 1].sum()
    own = Svd(rank=4, ranks={"2": 7}, weighting="none")(program)
    assert [own.state[f"{i}.v.weight"].shape[0] for i in (0, 2, 4)] == [4, 7, 4]


def test_a_layer_that_would_not_shrink_stays_and_says_so() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 64))
    result = Svd(rank=9, weighting="none").run(traced(net, 2, 16), Context())
    told = {action.layer: (action.changed, action.reason) for action in result.actions}
    assert told["0"] == (False, "rank 9 would store 288 numbers in the place of 256")
    assert told["2"][0]
    assert result.metrics["parameters_kept"] == pytest.approx((256 + 9 * 80) / (256 + 1024))


SPATIAL = [
    (nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 3, 9, 11)),
    (nn.Conv2d(3, 6, 3, padding="same", dilation=(1, 2)), (2, 3, 9, 11)),
    (nn.Conv2d(3, 6, 4, padding="same"), (2, 3, 8, 8)),
    (nn.Conv3d(2, 5, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)), (2, 2, 5, 6, 7)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), SPATIAL)
@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_a_convolution_of_exactly_that_rank_stays_what_it_is(
    layer: nn.Module, shape: tuple[int, ...], form: str
) -> None:
    torch.manual_seed(1)
    out, inner, first, *rest = layer.weight.shape
    left = torch.randn(out, *rest, 2) if form == "spatial" else torch.randn(out, 2)
    if form == "spatial":  # W[o, i, k, ...] = sum_r left[o, ..., r] right[r, i, k]
        weight = torch.einsum("o...r,rik->oik...", left, torch.randn(2, inner, first))
    else:
        weight = torch.einsum("or,r...->o...", left, torch.randn(2, *layer.weight.shape[1:]))
    layer.weight.data = weight
    program = traced(One(layer), *shape)
    options = {"rank": 2, "weighting": "none", "convolutions": form}
    made = Svd(**options, max_error=1e-5)(program)
    assert made.state["layer.v.weight"].shape[0] == 2
    assert sum(p.numel() for p in made.parameters().values()) < weight.numel() + out


def test_a_convolution_is_weighted_by_its_windows() -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 8, 3, padding=1, stride=2)
    x = torch.randn(16, 3, 9, 9).cumsum(2).cumsum(3)
    program, batches = traced(One(layer), 2, 3, 9, 9), [{"x": part} for part in x.split(4)]
    exact, errors = program(x).detach(), {}
    for weighting in ("none", "activations"):
        made = Svd(rank=3, weighting=weighting)(program, calibration=batches)
        errors[weighting] = float((made(x).detach() - exact).norm())
    flat = (exact - layer.bias.detach()[:, None, None]).transpose(0, 1).flatten(1).double()
    bound = float(torch.linalg.svdvals(flat)[3:].norm())
    assert errors["activations"] == pytest.approx(bound, rel=1e-3)
    assert errors["none"] > 1.3 * bound


def test_every_layer_that_stays_has_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 16)
            self.body, self.plain = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
            self.group = nn.Conv1d(16, 16, 3, padding=1, groups=2)
            self.head = nn.Linear(16, 50, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.group(self.plain(self.body(self.table(x))).transpose(1, 2)).transpose(1, 2)
            return self.head(h * self.body.weight.mean())

    program = gw.trace(Net().eval(), (torch.randint(0, 50, (2, 7)),))
    with pytest.raises(ModelError, match="no selected layer can be decomposed"):
        Svd(rank=1, weighting="none", targets=["group"])(program)
    result = Svd(rank=2, weighting="none").run(program, Context())
    told = {action.layer: action.reason for action in result.actions if not action.changed}
    assert told["group"].startswith("a grouped convolution")
    assert told["body"] == "its weight is also read by mean"
    assert set(told) == {"group", "body", "head"}
    assert told["head"].startswith("a language model's head")


def test_a_shared_weight_is_one_pair() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    made = Svd(rank=3, weighting="none")(traced(net, 2, 16))
    assert [layer.name for layer in layers(made)] == ["0.v", "0.u", "0.v", "0.u"]
    assert sum(p.numel() for p in made.parameters().values()) == 2 * 3 * 16 + 2 * 16


def test_wrong_options() -> None:
    for wrong in ({"rank": 2, "energy": 0.5}, {"rank": 2, "ratio": 0.4}, {"energy": 1.5}):
        with pytest.raises(ArgumentError):
            Svd(**wrong)
    with pytest.raises(ArgumentError, match="spatial pairs have no closed form"):
        Svd(rank=2, convolutions="spatial")
    with pytest.raises(ModelError, match="'3' matches no layer"):
        Svd(rank=2, ranks={"3": 2}, weighting="none")(traced(One(nn.Linear(8, 8)), 2, 8))


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_it_lowers_quantizes_and_comes_back_from_a_file(backend: str, tmp_path: object) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    program, x = traced(net, 4, 64), torch.randn(32, 64)
    made = Svd(rank=8)(program, calibration=[(x,)])
    made.save(f"{tmp_path}/made.pt2")
    made = gw.load(f"{tmp_path}/made.pt2")
    for coded in (made, gw.passes.quantize.Rtn(bits=4, block=8)(made),
                  gw.passes.quantize.Int8()(made)):  # fmt: skip
        compiled = gw.lower(coded, backend)
        error = gw.compare(coded(x).detach(), compiled(x).detach())
        assert error.relative < 0.03
    again = gw.passes.prune.Magnitude(sparsity=0.5)(made)
    assert float((again.state["0.u.weight"] == 0).float().mean()) == 0.5
