from __future__ import annotations

import pytest
import torch
from models.adapters import layers_program, moved
from models.every_pass import LABELLED, UNTIED

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = (
    "text",
    [
        ("adapt.lora", {"rank": 2, "targets": UNTIED}),
        ("tune.finetune", {"tune": LABELLED}),
        ("adapt.merge", {}),
        ("adapt.unmerge", {}),
    ],
)


def test_bytes_come_back_also_behind_two_merges() -> None:
    before = layers_program()
    one = moved(gw.passes.adapt.Lora(targets=["fc", "plain"], rank=2, name="one")(before))
    merged = gw.passes.adapt.Merge()(one)
    two = gw.passes.adapt.Ia3(targets=["fc"], name="two")(merged)
    merged = gw.passes.adapt.Merge()(moved(two, seed=2))
    assert not torch.equal(merged.state["fc.bias"], before.state["fc.bias"])
    back = gw.passes.adapt.Unmerge()(merged, teacher=before)
    assert all(torch.equal(back.state[n], t) for n, t in before.state.items())
    assert set(back.state) == set(before.state)
    assert set(back.trainable()) == set(before.trainable())


def test_another_base_or_a_changed_weight_is_refused() -> None:
    before = layers_program()
    merged = gw.passes.adapt.Merge()(moved(gw.passes.adapt.Lora(targets=["fc"], rank=2)(before)))
    other = moved(before)
    with pytest.raises(ModelError, match="is not the tensor"):
        gw.passes.adapt.Unmerge()(merged, teacher=other)
    with pytest.raises(ModelError, match="was changed after"):
        gw.passes.adapt.Unmerge()(moved(merged), teacher=before)
    with pytest.raises(ModelError, match="no adapter was merged"):
        gw.passes.adapt.Unmerge()(before, teacher=before)
