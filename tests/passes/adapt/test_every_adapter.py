"""What every adapter promises: identity at the start, few parameters, merging, saving, lowering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import check_merge, gradients, layers_program, moved

import graphwright as gw

ALL = ["*"]
RANKS = {"deep": 2}
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora": ("Lora", {"rank": 4, "ranks": RANKS}, 1e-6),
    "dora": ("Dora", {"rank": 4, "ranks": RANKS, "alpha": 6.0}, 1e-5),
    "dora_dropout": ("Dora", {"rank": 4, "ranks": RANKS, "dropout": 0.1}, 1e-5),
    "ia3": ("Ia3", {}, 1e-6),
    "ia3_inputs": ("Ia3", {"feedforward": ALL}, 1e-6),
    "pissa": ("Pissa", {"rank": 4, "ranks": RANKS}, 1e-5),
    "pissa_fast": ("Pissa", {"rank": 2, "iterations": 4}, 1e-5),
    "loldu": ("Loldu", {"rank": 3}, 1e-5),
    "loldu_scale": ("Loldu", {"rank": 3, "train_scale": True}, 1e-5),
    "lora_xs": ("LoraXs", {"rank": 3}, 1e-3),
    "krona": ("Krona", {"factor_out": 4, "factor_in": 2, "targets": ["*", "!deep"]}, 1e-6),
    "krona_interleaved": (
        "Krona",
        {"factor_out": 4, "factor_in": 1, "layout": "interleaved"},
        1e-6,
    ),
}


def adapted(case: str) -> tuple[Any, Any]:
    before = layers_program()
    name, options, _ = CASES[case]
    made = getattr(gw.passes.adapt, name)(**{"targets": ALL, **options})
    return before, made(before)


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_program_and_merges(case: str) -> None:
    before, after = adapted(case)
    inputs = torch.randn(5, 8, 10)
    with torch.no_grad():
        error = float((after(inputs) - before(inputs)).norm() / before(inputs).norm())
    assert error < CASES[case][2]
    check_merge(before, after, inputs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_adapter_and_nothing_else(case: str) -> None:
    before, after = adapted(case)
    found = gradients(moved(after), torch.randn(5, 8, 10))
    own = set(after.trainable())
    assert set(found) == own
    assert own
    assert not own & set(before.state)
    assert all(float(g.abs().max()) > 0 for g in found.values())


@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_and_lowered(case: str, tmp_path: Path) -> None:
    changed = moved(adapted(case)[1])
    inputs = torch.randn(5, 8, 10)
    wanted = changed(inputs).detach()
    changed.save(tmp_path / "a.pt2")
    loaded = gw.load(tmp_path / "a.pt2")
    assert torch.equal(loaded(inputs), wanted)
    torch.testing.assert_close(
        gw.passes.adapt.Merge()(loaded)(inputs).detach(), wanted, rtol=1e-4, atol=1e-5
    )
    for backend in ("onnxruntime", "triton"):
        lowered = gw.lower(changed, backend)(inputs).detach()
        torch.testing.assert_close(lowered, wanted, rtol=1e-3, atol=1e-4)
