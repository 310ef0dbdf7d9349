"""Layer by layer against hooks on the module itself."""

import pytest
import torch
from torch import nn

from graphwright.ir.check.layer_errors import layer_errors
from graphwright.ir.trace.capture import trace


def two_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    other = nn.Sequential(
        *(nn.Linear(*m.weight.T.shape) if hasattr(m, "weight") else m for m in model)
    )
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[2].weight.mul_(1.01)
    return model, other


def outputs(model, x):
    found = {}
    hooks = [
        m.register_forward_hook(lambda _, __, out, name=n: found.__setitem__(name, out.detach()))
        for n, m in model.named_children()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_errors_equal_those_of_module_outputs():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    model, other = two_models()
    expected = outputs(model, x), outputs(other, x)
    original = trace(model, [x])
    result = original.replace(state=trace(other, [x]).state)
    rows = layer_errors(original, result)
    assert [row.name for row in rows] == ["0", "2", "4"]
    for row in rows:
        a, b = (found[row.name].double() for found in expected)
        assert row.error.relative == pytest.approx(float((a - b).norm() / a.norm()), abs=1e-7)
    assert rows[0].error.is_exact
    assert rows[1].error.relative > 0


def test_layers_beyond_the_budget_are_left_out():
    x = torch.randn(3, 6)
    original = trace(two_models()[0], [x])
    one = 3 * 6 * 4
    assert [row.name for row in layer_errors(original, original, budget=2 * one)] == ["0", "2"]
    assert layer_errors(original, original, budget=0) == []
