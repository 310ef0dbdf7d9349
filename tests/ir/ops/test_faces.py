"""Every declared op has its four faces, and they compute the same thing.

The table is `graphwright.ir.ops.OPS`, filled by walking the folder: a new op is tested by being
there. The reference of the numbers is the eager face in float64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphwright.ir.errors import LoweringError
from graphwright.ir.ops import OPS, Op, onnx_translations

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp:RuntimeWarning",  # numpy in Triton's interpreter
    "ignore::DeprecationWarning",  # torch's exporter calls deprecated parts of itself
    "ignore::FutureWarning",
)

ROUNDOFF = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error of a kernel, relative to the largest value; bfloat16 is two units in the last
place, for the interpreter truncates where a GPU rounds."""


def samples() -> Iterator[Any]:
    for name, op in OPS.items():
        for index, sample in enumerate(op.samples()):
            yield pytest.param(op, sample, id=f"{name}-{index}")


def outermost_samples(*, writes: bool = True) -> Iterator[Any]:
    """First and last sample of each op: the checks that take a second each."""
    for name, op in OPS.items():
        if op.writes and not writes:
            continue
        found = list(op.samples())
        yield pytest.param(op, found[0], id=f"{name}-first")
        yield pytest.param(op, found[-1], id=f"{name}-last")


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def largest(x: Tensor) -> float:
    """Largest absolute value; 0 for an empty tensor."""
    return float(x.double().abs().max()) if x.numel() else 0.0


def with_floats(sample: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in sample
    )


def test_every_file_of_the_folder_declares_an_op() -> None:
    folder = Path(__file__).parents[3] / "ir" / "ops"
    declared = {op.eager.__module__.rsplit(".", 1)[1] for op in OPS.values()}
    assert declared >= {file.stem for file in folder.glob("*.py")} - {"__init__", "registry"}


@pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))
def test_has_every_face(op: Op) -> None:
    for face in (op.eager, op.meta, op.onnx):
        assert callable(face)
    assert op.overload in onnx_translations()
    assert len(list(op.samples())) >= 2
    if importlib.util.find_spec("triton") is not None:
        kernel = op.load_kernel()
        assert any(kernel.fits(*sample) for sample in op.samples())


@pytest.mark.parametrize(("op", "sample"), list(outermost_samples()))
def test_opcheck(op: Op, sample: tuple[Any, ...]) -> None:
    """Schema, meta face, gradient registration and tracing, by torch's own checker."""
    torch.library.opcheck(op.overload, sample)


@pytest.mark.parametrize(("op", "sample"), list(samples()))
def test_results_are_new_and_contiguous(op: Op, sample: tuple[Any, ...]) -> None:
    inputs = {v.untyped_storage().data_ptr() for v in sample if isinstance(v, Tensor)}
    outputs = [out.untyped_storage().data_ptr() for out in as_tuple(op.overload(*sample))]
    assert not inputs & set(outputs)
    assert len(set(outputs)) == len(outputs)
    assert all(out.is_contiguous() for out in as_tuple(op.overload(*sample)))


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize(("op", "sample"), list(samples()))
def test_kernel_agrees_with_eager(op: Op, sample: tuple[Any, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = with_floats(sample, dtype)
    sample = tuple(v.to(device) if isinstance(v, Tensor) else v for v in sample)
    kernel = op.load_kernel()
    if not kernel.fits(*sample):
        pytest.skip("the kernel leaves this sample to eager")
    reference = as_tuple(op.eager(*with_floats(sample, torch.float64)))
    for actual, expected in zip(as_tuple(kernel.launch(*sample)), reference, strict=True):
        assert actual.dtype == (dtype if expected.is_floating_point() else expected.dtype)
        assert actual.shape == expected.shape
        assert largest(actual - expected) <= ROUNDOFF[dtype] * largest(expected)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.writes], ids=lambda op: op.name)
def test_an_op_that_writes_has_no_form_in_onnx(op: Op) -> None:
    with pytest.raises(LoweringError, match=f"graphwright::{op.name} has no ONNX form"):
        op.onnx(*next(iter(op.samples())))


@pytest.mark.parametrize(("op", "sample"), list(outermost_samples(writes=False)))
def test_gradient_is_that_of_eager(op: Op, sample: tuple[Any, ...]) -> None:
    leaves = [
        v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in sample
    ]
    wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]

    def gradients(function: Any) -> tuple[Tensor, ...]:
        outputs = [out for out in as_tuple(function(*leaves)) if out.requires_grad]
        if not outputs:
            return ()
        total = sum((out.double() ** 2).sum() for out in outputs)
        return torch.autograd.grad(total, wanted, allow_unused=True)  # type: ignore[arg-type]

    for actual, expected in zip(gradients(op.overload), gradients(op.eager), strict=True):
        torch.testing.assert_close(actual, expected)


class Everything(torch.nn.Module):
    """Calls every op that only computes on each of its samples; tensors come in, not folded."""

    def __init__(self) -> None:
        super().__init__()
        pure = [op for op in OPS.values() if not op.writes]
        self.calls = [(op, sample) for op in pure for sample in op.samples()]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(
            value.contiguous()
            for _, sample in self.calls
            for value in sample
            if isinstance(value, Tensor)
        )

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        results: list[Tensor] = []
        for op, sample in self.calls:
            arguments = [next(given) if isinstance(v, Tensor) else v for v in sample]
            results += as_tuple(op.overload(*arguments))
        return results


def test_onnx_face_agrees_with_eager_in_onnx_runtime() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Everything().eval()
    inputs = model.tensors()
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            custom_translation_table=onnx_translations(),
            opset_version=21,
            verbose=False,
        )
        expected = model(*inputs)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    actual = session.run(None, feed)
    names = [op.name for op, sample in model.calls for _ in as_tuple(op.overload(*sample))]
    for name, found, wanted in zip(names, actual, expected, strict=True):
        found = torch.from_numpy(found)
        assert found.dtype == wanted.dtype, name
        assert largest(found - wanted) <= 5e-6 * largest(wanted), name
