from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.ops.table import dequantize_table, levels, pack, unpack
from graphwright.ir.stored import table as table_math

CHAIN = ("text", [("quantize.nf4", {})])

Nf4 = gw.passes.quantize.Nf4


class Net(nn.Module):
    """Every kind of weight, rows that end inside a block, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 37)
        self.down = nn.Linear(37, 64, bias=False)
        self.mix = nn.Parameter(torch.randn(64, 33) / 8)
        self.conv = nn.Conv1d(64, 6, 3)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.embed(ids)
        h = h + self.down(torch.relu(self.up(h)))
        return h @ self.mix, self.conv(h.transpose(1, 2)), self.head(h)


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 7))
    return gw.trace(Net().eval(), (ids,), {"ids": {0: "n", 1: "s"}})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


# ---- levels


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    # QLoRA, appendix E: 8 quantiles above zero and 7 below, of evenly spaced probabilities
    # that end at 0.9677083; divided by the largest.
    positive = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    np.testing.assert_allclose(levels("nf4").numpy(), expected, atol=3e-7)


def test_fp4_levels_are_those_of_bitsandbytes() -> None:
    # Its documented table: 0, 0.0625, 8, 12, 4, 6, 2, 3 over 12; the high bit is the sign.
    found = levels("fp4")
    expected = [0.0, 0.00520833333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
    torch.testing.assert_close(found[:8], torch.tensor(expected))
    assert torch.equal(found[8:], -found[:8])


def test_dynamic_levels_have_a_decade_per_exponent() -> None:
    found = sorted(levels("dynamic").double().tolist())
    expected = [0.0, 1.0]
    for exponent in range(7):
        step = 0.9 / 2**exponent
        for place in range(2**exponent):
            middle = (0.1 + (place + 0.5) * step) * 10.0 ** (exponent - 6)
            expected += [middle, -middle]
    np.testing.assert_allclose(found, sorted(expected), rtol=1e-6)


# ---- codes


@pytest.mark.parametrize("table", ["nf4", "fp4", "dynamic"])
def test_codes_are_the_nearest_levels(table: str) -> None:
    x = random(2000) * 25
    x = torch.cat([x.clamp(-1, 1), levels(table), torch.zeros(1)])
    codes = table_math.nearest_codes(x, table)
    level = levels(table).double()
    distance = (x.double()[:, None] - level).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # float32 midpoints are one rounding away from the true ones
    assert bool((chosen <= distance.amin(1) + 1e-8).all())
    assert torch.equal(levels(table)[codes[2000:-1].long()], levels(table))


def test_the_first_of_two_codes_is_in_the_high_half() -> None:
    stored = table_math.quantize(torch.tensor([1.0, -1.0, 0.0]), "nf4", 16, double=False)
    # 1 is the code 15, -1 the code 0, and 0 the code 7; the byte is filled up with 0
    assert stored.codes.tolist() == [0xF0, 0x70]
    assert stored.value().tolist() == [1.0, -1.0, 0.0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 15), max_size=40), st.sampled_from(["nf4", "fp4"]))
def test_pack_and_unpack_are_inverse(codes: list[int], table: str) -> None:
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(given_codes, table)
    assert packed.numel() == (len(codes) + 1) // 2
    assert torch.equal(unpack(packed, table, len(codes)), given_codes)


def test_blocks_run_over_the_ends_of_rows() -> None:
    w = random(5, 75)
    stored = table_math.quantize(w, "nf4", 64, double=False)
    flat, level = w.flatten().double(), levels("nf4").double()
    expected = torch.empty_like(flat)
    for start in range(0, 375, 64):
        part = flat[start : start + 64]
        largest = part.abs().max()
        for i, value in enumerate(part):
            nearest = (level - value / largest).abs().argmin()
            expected[start + i] = level[nearest] * largest
    torch.testing.assert_close(stored.value().flatten().double(), expected, rtol=1e-6, atol=0)


def test_double_quantization_is_its_formula() -> None:
    w = random(300, 300)
    plain = table_math.quantize(w, "nf4", 64, double=False)
    double = table_math.quantize(w, "nf4", 64, double=True)
    assert torch.equal(plain.codes, double.codes)
    assert plain.scale is not None
    scale = plain.scale.double()
    rest = scale - scale.mean()
    level, expected = levels("dynamic").double(), []
    for start in range(0, len(rest), 256):
        part = rest[start : start + 256]
        nearest = (part[:, None] / part.abs().max() - level).abs().argmin(1)
        expected.append(level[nearest] * part.abs().max() + scale.mean())
    torch.testing.assert_close(double.scales().double(), torch.cat(expected), rtol=1e-5, atol=0)
    assert float(((double.scales() - plain.scale) / plain.scale).abs().max()) < 0.01
    # 4 bits, 8 for 64 weights, 32 for 64 * 256, and one offset
    blocks = -(-90000 // 64)
    assert double.nbytes == 45000 + blocks + 4 * -(-blocks // 256) + 4


def test_zeros_stay_zeros() -> None:
    w = random(4, 64)
    w[1] = 0
    for double in (False, True):
        value = table_math.quantize(w, "nf4", 64, double=double).value()
        assert bool((value[1] == 0).all())
    assert bool((table_math.quantize(torch.zeros(9), "fp4", 16, double=True).value() == 0).all())


# ---- the pass


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_layer_is_stored_in_four_bits(program: gw.Program, kind: str) -> None:
    result = Nf4(kind=kind).execute(program, Context())
    after = result.program
    done = {action.layer: action for action in result.actions}
    assert all(kind in action.what for action in done.values())
    assert set(done) == {"embed", "up", "down", "mix", "conv", "head"}
    assert done["head"].reason == "shares the weight of embed"
    rebuilt = [n for n in after.graph.nodes if n.target is dequantize_table]
    assert len([n for n in rebuilt if n.args[2] == kind]) == 5
    assert 4.13 < result.metrics["bits_per_weight"] < 4.3
    assert 0.01 < measure(program, after).relative < 0.2
    bits = 8 * sum(t.nbytes for n, t in after.state.items() if "weight" in n or "mix" in n)
    count = sum(t.numel() for n, t in program.state.items() if "bias" not in n)
    assert bits / count == pytest.approx(result.metrics["bits_per_weight"])


def test_a_layer_computes_with_the_values_of_its_codes(program: gw.Program) -> None:
    after = Nf4(targets=["up", "mix"], double_quantization=False)(program)
    up = table_math.quantize(program.state["up.weight"], "nf4", 64, double=False).value()
    # a matmul's weight is stored (in, out), and its blocks run along what it sums over
    mix = table_math.quantize(program.state["mix"].t(), "nf4", 64, double=False).value().t()
    plain = program.replace(state={**program.state, "up.weight": up, "mix": mix})
    ids = program.examples[0]
    for ours, expected in zip(after(ids), plain(ids), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_saved_programs_come_back(program: gw.Program, tmp_path: Path) -> None:
    after = Nf4()(program)
    after.save(tmp_path / "four.pt2")
    again = gw.load(tmp_path / "four.pt2")
    ids = program.examples[0]
    for ours, expected in zip(again(ids), after(ids), strict=True):
        assert torch.equal(ours, expected)
    assert (tmp_path / "four.pt2").stat().st_size > after.state["up.weight_codes"].nbytes


def test_half_precision_weights_keep_their_dtype(program: gw.Program) -> None:
    half = gw.passes.cast.Dtype(to="bfloat16", max_error=0.1)(program)
    after = Nf4()(half)
    assert [out.dtype for out in after(program.examples[0])] == [
        out.dtype for out in half(program.examples[0])
    ]


def test_what_cannot_be_quantized_is_said(program: gw.Program) -> None:
    result = Nf4(embeddings=False).execute(program, Context())
    reasons = {a.layer: a.reason for a in result.actions if a.what == "left alone"}
    assert reasons["embed"] == "embeddings: false"
    assert "embed" in reasons["head"]
    again = Nf4().execute(result.program, Context())
    assert {a.layer: a.reason for a in again.actions}["up"] == "its weight is quantized already"
    with pytest.raises(ModelError, match="can quantize none of its targets"):
        Nf4(targets=["up"])(result.program)


# ---- ONNX Runtime


@pytest.mark.parametrize("options", [{}, {"double_quantization": False}, {"kind": "fp4"}], ids=str)
def test_products_read_codes_and_tables_are_gathered(
    program: gw.Program, options: dict[str, object]
) -> None:
    after = Nf4(**options)(program)
    compiled = gw.lower(after, "onnxruntime")
    assert compiled.notes["dropped"] == {}
    # up, down, mix and head; the embedding
    assert compiled.notes["steps"]["table"] == 5
    kernels = compiled.notes["kernels"]
    assert kernels["MatMulBnb4"] == 4
    assert "MatMul" not in kernels
    assert "Gemm" not in kernels
    ids = torch.randint(0, 50, (2, 11))
    for ours, expected in zip(compiled(ids), after(ids), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_file_stays_small_with_and_without_the_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 255)).eval()
    program = gw.trace(net, (torch.randn(2, 256),), {"input": {0: "n"}})
    dense = sum(t.nbytes for t in program.state.values())
    after = Nf4()(program)
    for skip in ([], ["table"]):
        folder = tmp_path / "-".join(["out", *skip])
        compiled = gw.lower(after, "onnxruntime", skip=skip)
        compiled.save(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert size < 0.16 * dense
        assert ("MatMulBnb4" in compiled.notes["kernels"]) == (not skip)


def test_lowers_to_fused_pytorch(program: gw.Program) -> None:
    after = Nf4()(program)
    compiled = gw.lower(after, "triton")
    ids = torch.randint(0, 50, (2, 11))
    for ours, expected in zip(compiled(ids), after(ids), strict=True):
        torch.testing.assert_close(ours, expected)
