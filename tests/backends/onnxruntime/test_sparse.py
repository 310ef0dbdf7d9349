"""Sparse initializers: ONNX Runtime loads them, and the file is smaller where it is said to be."""

import onnx
import pytest
import torch
from onnx import numpy_helper

import graphwright as gw
from graphwright.backends.onnxruntime.lowering import Lowering
from graphwright.backends.onnxruntime.sparse import store_sparse
from graphwright.ir.context import Context
from graphwright.passes.prune.magnitude import Magnitude


def program():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    return gw.trace(net.eval(), (torch.randn(3, 64),), dynamic={"input": {0: "batch"}})


def test_a_sparse_program_makes_a_smaller_file_that_computes_the_same(tmp_path):
    masked = Magnitude(sparsity=0.9)(program())
    dense = Lowering().lower(masked, Context())
    sparse = Lowering(sparse_initializers=True).lower(masked, Context())
    assert sparse.notes["sparse"]["weights"] == 2
    assert "sparse" not in dense.notes
    before = dense.save(tmp_path / "dense").file_bytes
    after = sparse.save(tmp_path / "sparse").file_bytes
    saved = sparse.notes["sparse"]["bytes_saved"]
    assert saved == pytest.approx(0.7 * 4 * (64 * 96 + 96 * 32), rel=0.01)  # 4 - 0.1 * 12 bytes
    assert before - saved < after < before - saved + 200
    x = torch.randn(7, 64)
    torch.testing.assert_close(sparse(x), masked(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gw.load(tmp_path / "sparse")(x), masked(x), rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(str(tmp_path / "sparse" / "model.onnx"))


def test_below_two_thirds_of_zeros_nothing_is_moved():
    masked = Magnitude(sparsity=0.6)(program())
    compiled = Lowering(sparse_initializers=True).lower(masked, Context())
    assert "sparse" not in compiled.notes
    assert not onnx.load_from_string(compiled.model).graph.sparse_initializer


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.66), ("float16", 0.79)])
def test_the_break_even_point_is_that_of_the_bytes(dtype, share):
    """A non-zero takes its own bytes and 8 more: a third of float32, a fifth of float16."""
    for zeros, moves in ((share, 0), (share + 0.02, 1)):
        w = torch.ones(1000)
        w[: int(1000 * zeros)] = 0
        tensor = numpy_helper.from_array(w.numpy().astype(dtype), "w")
        model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor]))
        store_sparse(model)
        assert len(model.graph.sparse_initializer) == moves


def test_integers_and_empty_weights_stay_dense():
    tensors = [torch.zeros(50, dtype=torch.int8), torch.zeros(50)]
    model = onnx.ModelProto(
        graph=onnx.GraphProto(
            initializer=[numpy_helper.from_array(t.numpy(), f"w{i}") for i, t in enumerate(tensors)]
        )
    )
    assert store_sparse(model) == {}
    assert len(model.graph.initializer) == 2
