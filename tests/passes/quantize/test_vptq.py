from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops.codebook import dequantize_codebook
from graphwright.passes.quantize._math import vptq_sizes
from graphwright.passes.quantize._math.vptq import Size

CHAIN = ("text", [("quantize.vptq", {"centroids": 16})])

Vptq = gw.passes.quantize.Vptq
Batches = list[tuple[Tensor, ...]]


class Net(nn.Module):
    """Linear layers with one input, a product, a convolution, and a table tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.left = nn.Linear(32, 64)
        self.right = nn.Linear(32, 64)
        self.mix = nn.Parameter(torch.randn(64, 48) / 8)
        self.conv = nn.Conv1d(48, 36, 3)
        self.split = nn.Conv1d(36, 36, 3, groups=2)
        self.tiny = nn.Linear(36, 3)  # fewer vectors than there are centroids
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        h = torch.tanh(self.left(x)) * self.right(x)
        h = torch.relu(self.conv((h @ self.mix).transpose(1, 2)))
        return self.tiny(self.split(h).transpose(1, 2)), self.head(x)


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (3, 12))
    return gw.trace(Net().eval(), (ids,), {"ids": {0: "n", 1: "s"}})


@pytest.fixture(scope="module")
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 60, (8, 20), generator=generator),) for _ in range(4)]


PRODUCTS = ("left", "right", "mix", "conv", "tiny")


def run(program: gw.Program, batches: Any, **options: Any) -> gw.passes.base.Result:
    return Vptq(**{"centroids": 64, **options}).execute(program, Context(calibration=batches))


def outputs(run_it: Callable[..., Any], batches: Batches) -> Tensor:
    with torch.no_grad():
        return torch.cat([run_it(*batch)[0].flatten() for batch in batches])


def test_products_are_looked_up_and_the_rest_is_explained(
    program: gw.Program, batches: Batches
) -> None:
    result = run(program, batches)
    done = {action.layer: action for action in result.actions}
    for name in PRODUCTS:
        assert done[name].what.startswith("v4-k64-0, ")
    assert done["embed"].reason == "an embedding table has no product to calibrate on"
    assert "embedding" in done["head"].reason
    assert done["split"].reason == "a grouped convolution"
    assert done["tiny"].reason == "only 36 distinct vectors"
    lookups = [n for n in result.program.graph.nodes if n.target is dequantize_codebook]
    assert len(lookups) == len(PRODUCTS)
    assert result.metrics["layers"] == len(PRODUCTS)


def test_the_reported_bits_are_the_stored_ones(program: gw.Program, batches: Batches) -> None:
    result = run(program, batches, residual_centroids=8, outlier_percent=5.0, groups=2)
    new = set(result.program.state) - set(program.state)
    stored = sum(result.program.state[name].nbytes for name in new)
    sizes = {"left": 64 * 32, "right": 64 * 32, "mix": 64 * 48, "conv": 36 * 48 * 3, "tiny": 36 * 3}
    assert result.metrics["bits_per_weight"] == pytest.approx(8 * stored / sum(sizes.values()))
    for action in result.actions:
        if action.layer in sizes:
            mine = [n for n in new if n.startswith((f"{action.layer}.weight_", f"{action.layer}."))]
            bits = 8 * sum(result.program.state[n].nbytes for n in mine) / sizes[action.layer]
            assert f"{bits:.3f} bits per weight" in action.what


def test_more_bits_are_nearer(program: gw.Program, batches: Batches) -> None:
    """Each codebook more brings the outputs nearer, and a layer computes x @ w'^T."""
    reference = outputs(program, batches)
    errors = []
    for options in ({}, {"residual_centroids": 16}, {"residual_centroids": 64}):
        after = run(program, batches, **options).program
        errors.append(float((outputs(after, batches) - reference).norm() / reference.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 0.6
    assert errors[2] < 0.2


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("outlier_percent", [0.0, 10.0])
def test_a_layer_computes_with_its_rebuilt_weight(
    program: gw.Program, batches: Batches, permute: bool, outlier_percent: float
) -> None:
    after = run(program, batches, permute=permute, outlier_percent=outlier_percent,
                targets=["right"]).program  # fmt: skip
    layer = next(each for each in layers(after) if each.name == "right")
    weight = weight_value(after, layer)
    plain = program.replace(state={**program.state, "right.weight": weight})
    torch.testing.assert_close(
        outputs(after, batches), outputs(plain, batches), rtol=1e-5, atol=1e-6
    )
    before = program.state["right.weight"].detach()
    assert 0.01 < float((weight - before).norm() / before.norm()) < 1.5


def test_the_seed_decides(program: gw.Program, batches: Batches) -> None:
    states = [
        Vptq(centroids=64, targets=["left"])(program, calibration=batches, seed=seed).state
        for seed in (0, 0, 1)
    ]
    books = [state["left.weight_main_codebooks"] for state in states]
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_the_result_does_not_depend_on_the_number_of_jobs(
    program: gw.Program, batches: Batches
) -> None:
    pass_ = Vptq(centroids=64, sequential=False)
    first, second = (
        pass_.execute(program, Context(calibration=batches, jobs=jobs)).program.state
        for jobs in (1, 2)
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_awkward_data_is_reported(program: gw.Program, batches: Batches) -> None:
    few = run(program, [(torch.randint(0, 60, (1, 6)),)], targets=["left"])
    assert "only 6 rows of calibration data: errors are not spread" in few.actions[0].reason
    table = program.state["embed.weight"].detach().clone()
    table[:, 5] = 0
    dead = program.replace(state={**program.state, "embed.weight": table})
    result = run(dead, batches, targets=["left"])
    assert "1 inputs are zero on all calibration data" in result.actions[0].reason
    coarse = program.state["left.weight"].detach().sign()
    coarse = program.replace(state={**program.state, "left.weight": coarse})
    result = run(coarse, batches, targets=["left"], vector_length=2, norm=False)
    assert "only 4 distinct vectors" in result.actions[0].reason
    # no more distinct vectors than entries: nothing is lost
    error = measure(coarse, result.program)
    assert error.relative < 1e-5


def test_wrong_options_and_programs_are_refused(program: gw.Program, batches: Batches) -> None:
    with pytest.raises(ArgumentError, match="residual_centroids is 0 for none, or at least 2"):
        Vptq(residual_centroids=1)
    with pytest.raises(ArgumentError, match="centroids"):
        Vptq(centroids=70000)
    with pytest.raises(ModelError, match="can quantize none of its targets"):
        run(program, batches, targets=["split"])
    again = run(program, batches).program
    with pytest.raises(ModelError, match="can quantize none of its targets") as caught:
        run(again, batches, targets=["left"])
    assert "left: its weight is quantized already" in caught.value.details
    bad = [(batches[0][0],)]
    table = program.state["left.bias"].detach().clone()
    table[0] = float("nan")
    broken = program.replace(state={**program.state, "left.bias": table})
    with pytest.raises(ModelError, match="NaN or infinity"):
        run(broken, bad)


def test_saved_programs_come_back(program: gw.Program, batches: Batches, tmp_path: Path) -> None:
    after = run(program, batches, residual_centroids=8, outlier_percent=5.0).program
    after.save(tmp_path / "vectors.pt2")
    again = gw.load(tmp_path / "vectors.pt2")
    assert torch.equal(outputs(again, batches), outputs(after, batches))


@pytest.mark.parametrize(
    "options",
    [{}, {"residual_centroids": 8, "outlier_percent": 5.0, "groups": 2}],
    ids=["plain", "everything"],
)
def test_lowers_to_onnx_runtime(
    program: gw.Program, batches: Batches, options: dict[str, Any]
) -> None:
    after = run(program, batches, **options).program
    compiled = gw.lower(after, "onnxruntime")
    assert compiled.notes["dropped"] == {}
    # what rebuilds the weights is computed when the session is made: products are all that runs
    assert "BitShift" not in compiled.notes["kernels"]
    assert "Range" not in compiled.notes["kernels"]
    torch.testing.assert_close(
        outputs(compiled, batches), outputs(after, batches), rtol=1e-4, atol=1e-5
    )
    fused = gw.lower(after, "triton")
    torch.testing.assert_close(outputs(fused, batches), outputs(after, batches))


def test_the_file_stays_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(192, 512), nn.ReLU(), nn.Linear(512, 192)).eval()
    program = gw.trace(net, (torch.randn(2, 192),), {"input": {0: "n"}})
    dense = sum(t.nbytes for t in program.state.values())
    options = {"centroids": 128, "kmeans_iterations": 5, "fit_steps": 0}
    result = run(program, [(torch.randn(600, 192),)], **options)
    compiled = gw.lower(result.program, "onnxruntime")
    compiled.save(tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert result.metrics["bits_per_weight"] < 2.2
    # the biases stay in float, and the graph takes a few kilobytes
    assert size < 0.1 * dense


# ---- bits


def test_the_expected_error_is_that_of_the_theory() -> None:
    # one number: Panter and Dite; endless vectors: the rate distortion bound
    assert vptq_sizes.share_left(1, 4) == pytest.approx(math.sqrt(3) * math.pi / 2 * 2**-8)
    assert vptq_sizes.share_left(160, 2) == pytest.approx(2**-4, rel=0.04)


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_sizes_are_the_best_of_those_that_fit(bits: float) -> None:
    size = vptq_sizes.sizes_for(bits, 768, 768)
    assert size is not None
    counted = vptq_sizes.bits_of(size, 768, 768)
    assert 0.75 * bits < counted <= bits
    # with a larger codebook of the same vectors the bits no longer do
    assert vptq_sizes.bits_of(Size(size.width, 4 * size.count, size.residual), 768, 768) > bits


def test_codebooks_that_take_more_than_the_weights_are_not_chosen() -> None:
    assert vptq_sizes.sizes_for(0.5, 4, 4) is None
    wide, narrow = (vptq_sizes.sizes_for(2, n, n) for n in (4096, 64))
    assert wide is not None
    assert narrow is not None
    assert wide.width > narrow.width


def test_bits_are_kept_by_every_layer(program: gw.Program, batches: Batches) -> None:
    errors = []
    for bits in (2.5, 4.0):
        options = Vptq(bits=bits, targets=["left", "right", "mix", "conv"])
        result = options.execute(program, Context(calibration=batches))
        for action in result.actions:
            assert float(action.what.split()[1]) <= bits
        errors.append(result.metrics["layer_error_mean"])
    assert errors[1] < 0.7 * errors[0]


def test_bits_that_no_codebook_fits_are_named(program: gw.Program, batches: Batches) -> None:
    with pytest.raises(ModelError) as caught:
        Vptq(bits=0.5, targets=["tiny"]).execute(program, Context(calibration=batches))
    assert "no codebook of its size fits 0.5 bits" in str(caught.value.details)
    with pytest.raises(ArgumentError, match="bits chooses vector_length"):
        Vptq(bits=2, centroids=16)


# ---- end to end


def test_codebooks_are_trained_together_and_indices_stay(batches: Batches) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48)).eval()
    x = torch.randn(64, 32)
    program = gw.trace(net, (x[:4],), {"input": {0: "n"}})
    said: list[str] = []
    context = Context(
        calibration=[(x,)], training=[{"input": x}], teacher=program,
        progress=lambda text, done, total: said.append(text),
    )  # fmt: skip
    options: dict[str, Any] = {"centroids": 16}
    plain = Vptq(**options).execute(program, context)
    tuned = Vptq(**options, end_to_end=True, tune={"steps": 40, "lr": 1e-2}).execute(
        program, context
    )
    assert tuned.metrics["steps"] == 40
    assert tuned.metrics["last_loss"] < 0.95 * tuned.metrics["first_loss"]
    assert any(t.startswith("end-to-end tuning, about") and "40 steps" in t for t in said)
    assert set(tuned.program.state) == set(plain.program.state)
    for name, old in plain.program.state.items():
        new = tuned.program.state[name]
        assert new.dtype == old.dtype
        is_book = "codebook" in name
        assert torch.equal(new, old) == (not is_book), name

    def distance(made: gw.Program) -> float:
        with torch.no_grad():
            return float((made(x) - program(x)).square().mean())

    assert distance(tuned.program) < distance(plain.program)
