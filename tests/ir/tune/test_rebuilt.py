from __future__ import annotations

import torch
from torch import fx, nn

import graphwright as gw
from graphwright.ir.program import Program
from graphwright.ir.tune.rebuilt import rebuild_in_backward


def adapted(width: int = 64) -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    program = gw.trace(net.eval(), (torch.randn(4, width),), {"input": {0: "batch"}})
    return gw.passes.adapt.Lora(rank=2)(gw.passes.quantize.Nf4(block=64)(program))


def run(program: Program, x: torch.Tensor, rebuilt: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by parameter, and the bytes of weight-sized floats that the backward keeps."""
    training = program.train()
    graph = fx.Graph()
    graph.output(graph.graph_copy(training.graph, {}))
    state = dict(training.state)
    if rebuilt:
        assert rebuild_in_backward(graph, state) == 2
    module = fx.GraphModule(state, graph)
    for p in program.parameters().values():
        p.grad = None
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point() and t.dim() == 2 and t.numel() == 64 * 64:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)[0].square().sum().backward()
    grads = {n: p.grad for n, p in program.trainable().items() if p.grad is not None}
    return grads, sum(kept.values())


def test_gradients_are_the_same_and_no_weight_in_floats_is_kept() -> None:
    program = adapted()
    x = torch.randn(5, 64)
    plain, kept = run(program, x, rebuilt=False)
    again, less = run(program, x, rebuilt=True)
    assert kept >= 64 * 64 * 4  # the second layer's: its input has a gradient
    assert less == 0
    assert set(plain) == set(again) == set(program.trainable())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_codes_that_are_trained_keep_their_gradient() -> None:
    program = adapted()
    stored = {n: t.detach() for n, t in program.state.items()}
    (first, *_) = [n for n, t in stored.items() if ".weight_" in n and t.is_floating_point()]
    stored[first] = nn.Parameter(stored[first])
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    assert rebuild_in_backward(graph, stored) < 2


def test_a_value_that_a_recipe_puts_in_has_its_gradient() -> None:
    program = adapted()
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    assert rebuild_in_backward(graph, program.state) == 2
    module = fx.GraphModule(dict(program.state), graph)
    name = next(n for n, t in program.state.items() if ".weight_" in n and t.is_floating_point())
    value = program.state[name].detach().clone().requires_grad_()
    (y,) = torch.func.functional_call(module, {name: value}, (torch.randn(3, 64),))
    (gradient,) = torch.autograd.grad(y.sum(), value)
    assert gradient.abs().max() > 0
