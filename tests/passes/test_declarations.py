"""A pass declares what it does to weights and to the interface; the base class holds it to that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ContractError
from graphwright.ir.graph.digest import digest
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.registry import all_passes


@pytest.fixture(scope="module")
def program() -> gw.Program:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8))
    return gw.trace(net.eval(), (torch.randn(3, 2, 4, 4),), {"input": {0: "batch"}})


class Renames(Pass):
    """Gives the input another name."""

    def run(self, program: gw.Program, context: Context) -> Result:
        first = replace(program.signature.inputs[0], name="other")
        return Result(program.replace(signature=replace(program.signature, inputs=(first,))))


class Declares(Renames):
    """Does the same, and says so."""

    changes_interface = True


def test_an_interface_that_changes_has_to_be_declared(program: gw.Program) -> None:
    with pytest.raises(ContractError, match="changed the inputs of the program"):
        Renames().execute(program, Context())
    changed = Declares().execute(program, Context()).program
    assert changed.signature.inputs[0].name == "other"


def test_every_pass_is_recorded_with_the_digest_of_what_it_was_given(program: gw.Program) -> None:
    folded = gw.passes.cleanup.FoldBatchNorm()(program)
    rounded = gw.passes.quantize.Rtn(block=16)(folded)
    assert [entry.digest for entry in rounded.provenance] == [digest(program), digest(folded)]


def test_a_remark_is_no_refusal(program: gw.Program) -> None:
    """Blocks smaller than asked for are remarked on, and the layer is rounded all the same."""
    result = gw.passes.quantize.Rtn(block=128).execute(program, Context())
    remarked = [action for action in result.actions if action.reason]
    assert remarked
    assert all(action.changed for action in remarked)
    left = gw.passes.quantize.Int8().execute(program, Context()).actions
    assert {action.layer: action.changed for action in left} == {"0": False, "3": True}


def test_effects_follow_from_declarations(program: gw.Program) -> None:
    passes = all_passes()
    nothing = Result(program)
    assert passes["quantize.rtn"]().effect(nothing) == "compressed"
    assert passes["tune.finetune"]().effect(nothing) == "trained"
    assert passes["cleanup.remove_identities"]().effect(nothing) == "kept"
    fold = passes["cleanup.fold_batch_norm"]()
    assert fold.effect(nothing) == "kept"
    assert fold.effect(Result(program, (Action("1", "folded into 0"),))) == "reformed"
