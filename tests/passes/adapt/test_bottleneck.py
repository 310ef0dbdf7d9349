from __future__ import annotations

import pytest
import torch
from models.adapters import gradients, layers_program, moved
from models.every_pass import UNTIED

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = ("text", [("adapt.bottleneck", {"targets": UNTIED})])


@pytest.mark.parametrize("reads", ["output", "input"])
def test_it_is_the_formula_and_starts_as_the_program(reads: str) -> None:
    before = layers_program()
    made = gw.passes.adapt.Bottleneck(targets=["turned"], width=5, reads=reads, scale=0.1)(before)
    x = torch.randn(4, 8, 10)
    torch.testing.assert_close(made(x), before(x), rtol=1e-6, atol=1e-6)
    changed = moved(made)
    inner = 8 if reads == "output" else 12
    assert sum(p.numel() for p in made.trainable().values()) == 5 * inner + 5 + 8 * 5 + 8
    assert set(gradients(changed, x)) == set(made.trainable())
    last = next(n for n in before.graph.nodes if n.target is torch.ops.aten.matmul.default)
    values = torch.fx.Interpreter(before.module)
    seen: dict[str, torch.Tensor] = {}
    run = values.run_node
    values.run_node = lambda n: seen.setdefault(n.name, run(n))  # type: ignore[method-assign]
    values.run(x)
    source = seen[last.name] if reads == "output" else seen[last.args[0].name]
    d, e, u, v = (changed.state[n].detach() for n in changed.trainable())
    wanted = seen[last.name] + 0.1 * (torch.nn.functional.gelu(source @ d.T + e) @ u.T + v)
    torch.testing.assert_close(changed(x), wanted, rtol=1e-4, atol=1e-5)


def test_it_is_lowered_as_it_is_and_not_merged() -> None:
    changed = moved(gw.passes.adapt.Bottleneck(targets=["fc"], width=5)(layers_program()))
    x = torch.randn(4, 8, 10)
    for backend in ("onnxruntime", "triton"):
        lowered = gw.lower(changed, backend)(x)
        torch.testing.assert_close(lowered.detach(), changed(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="by more than its weight"):
        gw.passes.adapt.Merge()(changed)
