"""prune.compress: the same function from fewer bytes, in the program and in both artifacts."""

import pytest
import torch
from models.masked_nets import images, mixed

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.graph.cost import cost
from graphwright.ir.ops.expand_2_4 import compress_2_4, expand_2_4
from graphwright.ir.ops.linear_2_4 import linear_2_4
from graphwright.passes.prune.compress import Compress
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.quantize.int8 import Int8

CHAIN = ("text", [("prune.magnitude", {"pattern": "2:4"}), ("prune.compress", {})])


def halved(**options):
    return Magnitude(pattern="2:4", **options)(mixed())


@pytest.mark.parametrize("columns", [4, 8, 12, 64])
def test_values_and_places_hold_the_weight(columns):
    w = torch.randn(5, columns)
    w = w.where(torch.rand(5, columns // 4, 4).argsort(2).argsort(2).flatten(1) < 2, 0.0)
    w[0, :4] = torch.tensor([0.0, 0.0, 0.0, 3.0])  # fewer than two
    w[1] = 0.0
    values, places = compress_2_4(w)
    assert values.shape == (5, columns // 2)
    assert places.shape == (5, -(-columns // 8))
    assert torch.equal(expand_2_4(values, places), w)


def test_a_group_of_three_is_refused():
    with pytest.raises(ValueError, match="more than two"):
        compress_2_4(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    with pytest.raises(ValueError, match="6 columns"):
        compress_2_4(torch.zeros(2, 6))


def test_the_program_computes_the_same_from_half_the_bytes():
    masked = halved()
    result = Compress().execute(masked, Context())
    for batch in images(2):
        assert torch.equal(masked(*batch), result.program(*batch))
    said = {a.layer: (a.what, a.reason) for a in result.actions}
    assert [said[n][0] for n in ("conv", "fc1", "fc2")] == ["two of four"] * 3
    assert said["grouped"] == ("left alone", "its 18 inputs do not divide into groups of 4")
    dense = sum(masked.state[f"{n}.weight"].numel() * 4 for n in ("conv", "fc1", "fc2"))
    assert result.metrics["bytes_before"] == dense
    saved = cost(masked).weight_bytes - cost(result.program).weight_bytes
    assert saved == dense - result.metrics["bytes_after"]
    assert result.metrics["bytes_after"] < 0.56 * dense
    assert cost(result.program).parameters == cost(masked).parameters
    assert "fc1.weight" not in result.program.state


def test_unstructured_zeros_are_stored_as_any_value():
    masked = Magnitude(sparsity=0.7)(mixed())
    assert cost(masked).weight_bytes == cost(mixed()).weight_bytes
    result = Compress(targets=["fc1"]).execute(masked, Context())
    assert "hold more than two" in result.actions[0].reason
    assert result.program.graph is masked.graph


def test_a_matmul_weight_is_compressed_along_its_inputs():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return x @ self.weight

    program = gw.trace(Product().eval(), (torch.randn(3, 8),))
    masked = Magnitude(pattern="2:4")(program)
    small = Compress()(masked)
    x = torch.randn(3, 8)
    torch.testing.assert_close(small(x), masked(x))
    assert small.state["weight.kept"].shape == (6, 4)


def test_both_artifacts_compute_it():
    masked = halved()
    small = Compress()(masked)
    batch = images(1, 5)[0]
    expected = masked(*batch)
    fused = gw.lower(small, "triton")
    torch.testing.assert_close(fused(*batch), expected)
    assert fused.notes["fused"]["linear_2_4"] == 2
    lowered = gw.lower(small, "onnxruntime")
    torch.testing.assert_close(lowered(*batch), expected, rtol=1e-4, atol=1e-5)
    assert lowered.notes["translator"] == "direct"


def test_the_onnx_file_of_a_large_layer_is_little_more_than_half(tmp_path):
    program = gw.trace(torch.nn.Linear(256, 256, bias=False).eval(), (torch.randn(2, 256),))
    masked = Magnitude(pattern="2:4")(program)
    plain = gw.lower(masked, "onnxruntime").save(tmp_path / "plain").file_bytes
    small = gw.lower(Compress()(masked), "onnxruntime").save(tmp_path / "small").file_bytes
    assert 256 * 256 * 2 < small < 0.56 * plain


def test_it_saves_and_loads(tmp_path):
    small = Compress()(halved())
    small.save(tmp_path / "small.pt2")
    batch = images(1)[0]
    assert torch.equal(gw.load(tmp_path / "small.pt2")(*batch), small(*batch))


def test_the_layers_left_dense_can_be_quantized():
    small = Compress(targets=["fc1"])(halved(targets=["fc1"]))
    quantized = Int8(activations="dynamic", targets=["fc2"])(small)
    batch = images(1)[0]
    assert gw.compare(small(*batch), quantized(*batch)).relative < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_kernels_agree_with_the_dense_layer(dtype):
    w = torch.randn(64, 128, device="cuda", dtype=dtype)
    w = w.where(torch.rand(64, 32, 4, device="cuda").argsort(2).argsort(2).flatten(1) < 2, 0.0)
    values, places = compress_2_4(w)
    bias = torch.randn(64, device="cuda", dtype=dtype)
    for shape in [(3, 17, 128), (1, 128)]:
        x = torch.randn(*shape, device="cuda", dtype=dtype)
        for _ in range(2):  # packs, then finds it packed
            actual = linear_2_4(x, values, places, bias)
            expected = torch.nn.functional.linear(x.double(), w.double(), bias.double())
            torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-1)
    values.mul_(2)  # what was packed before is stale now
    doubled = linear_2_4(x, values, places, bias).double()
    expected = torch.nn.functional.linear(x.double(), 2 * w.double(), bias.double())
    torch.testing.assert_close(doubled, expected, rtol=2e-2, atol=4e-1)
