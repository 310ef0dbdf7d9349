"""An engine's error says what failed, not where it was noticed."""

from __future__ import annotations

import warnings

import pytest
import torch

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.trace.capture import trace


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor, rate: int) -> torch.Tensor:
        if rate != 2:
            raise ValueError("only a rate of 2 is known")
        return x @ x


def raised(*inputs: object) -> Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(Doubled())
    with pytest.raises(Exception) as caught:  # noqa: PT011
        script(*inputs)
    return caught.value


def test_an_operator_in_torchscript() -> None:
    assert "TorchScript interpreter" in str(raised(torch.ones(2, 3), 2))
    assert innermost(raised(torch.ones(2, 3), 2)).startswith("mat1 and mat2 shapes cannot be")


def test_an_exception_in_torchscript() -> None:
    assert innermost(raised(torch.ones(2, 2), 3)) == "only a rate of 2 is known"


def test_other_messages() -> None:
    wrapped = RuntimeError("")
    wrapped.__cause__ = ValueError("the cause")
    assert innermost(wrapped) == "the cause"
    assert innermost(KeyError()) == "KeyError"
    assert innermost(RuntimeError("one line\n\nmore")) == "one line"
    dynamo = "when making fake tensor call\n  node failed: got RuntimeError('shapes [2] and [3]')"
    assert innermost(RuntimeError(dynamo)) == "shapes [2] and [3]"


def test_a_trace_of_torchscript_names_it() -> None:
    from graphwright.ir.files.torchscript import ScriptedModule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(2, 3))
    with pytest.raises(ModelError, match=r"do(es)? not|cannot|must") as caught:
        trace(ScriptedModule(script), {"input": torch.ones(2, 4)})  # type: ignore[arg-type]
    assert "interpreter" not in caught.value.message
