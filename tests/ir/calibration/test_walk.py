from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.calibration.hessian import hessian
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.store import LayerStore
from graphwright.ir.calibration.walk import _Sweep, sweep
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program


class Attention(nn.Module):
    """Three layers on one activation, one behind them, and two more in a row."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        x = x + self.o(scores @ self.v(x))
        return x + self.down(torch.relu(self.up(x)))


class Halve:
    """Halves every weight and notes what it was shown."""

    def __init__(self) -> None:
        self.sites: list[tuple[str, ...]] = []
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.original: dict[str, list[torch.Tensor]] = {}
        self.solved: list[str] = []

    def gather(self, site: Site) -> Any:
        names = tuple(layer.name for layer in site.layers)
        self.sites.append(names)
        for name in names:
            self.seen[name] = [x.clone() for x in site.inputs()]
        return hessian(site.rows()).matrix

    def solve(self, task: Task) -> Solved:
        self.solved.append(task.name)
        return Solved(task.weight / 2, state={"h": task.stats}, info={"seed": float(task.seed)})


class HalveBoth(Halve):
    def gather(self, site: Site) -> Any:
        for layer in site.layers:
            self.original[layer.name] = [x.clone() for x in site.original_inputs()]
        return super().gather(site)


def traced(model: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    return gw.trace((model or Attention()).eval(), {"x": torch.randn(2, 5, 8)},
                    dynamic={"x": {0: "batch"}})  # fmt: skip


def batches(count: int = 3) -> list[tuple[torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(2 + index, 5, 8),) for index in range(count)]


def halved(program: Program, but: tuple[str, ...] = ()) -> Program:
    state = {
        name: value / 2 if name.endswith("weight") and name.split(".")[0] not in but else value
        for name, value in program.state.items()
    }
    return program.replace(state=state)


def inputs_of(program: Program, name: str, batch: torch.Tensor) -> torch.Tensor:
    """What a layer reads, by a plain run of the graph."""
    layer = next(layer for layer in layers(program) if layer.name == name)
    found = {}

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Tap(program.module).run(batch)
    return found[layer.node.args[0]]


def test_layers_that_read_one_activation_share_what_is_gathered() -> None:
    method = Halve()
    program = traced()
    sweep(program, layers(program, ("linear",)), batches(), method, Context())
    assert method.sites == [("q", "k", "v"), ("o",), ("up",), ("down",)]
    assert method.solved == ["q", "k", "v", "o", "up", "down"]


def test_a_layer_sees_what_the_solved_layers_before_it_give() -> None:
    program, method, data = traced(), Halve(), batches()
    sweep(program, layers(program, ("linear",)), data, method, Context())
    for name, later in {"o": ("o", "up", "down"), "down": ("down",)}.items():
        expected = halved(program, but=later)
        for seen, (x,) in zip(method.seen[name], data, strict=True):
            torch.testing.assert_close(seen, inputs_of(expected, name, x))


def test_original_inputs_are_those_of_the_unchanged_program() -> None:
    program, method, data = traced(), HalveBoth(), batches()
    sweep(program, layers(program, ("linear",)), data, method, Context(), both=True)
    for seen, (x,) in zip(method.original["down"], data, strict=True):
        torch.testing.assert_close(seen, inputs_of(program, "down", x))
    assert not torch.allclose(method.seen["down"][0], method.original["down"][0])


def test_following_the_program_shows_the_same_whatever_was_solved() -> None:
    program, method, data = traced(), Halve(), batches()
    sweep(program, layers(program, ("linear",)), data, method, Context(jobs=3), follow="program")
    for seen, (x,) in zip(method.seen["down"], data, strict=True):
        torch.testing.assert_close(seen, inputs_of(program, "down", x))


def test_results_do_not_depend_on_jobs_selection_or_memory() -> None:
    program, data = traced(), batches()
    chosen = layers(program, ("linear",))
    plain = sweep(program, chosen, data, Halve(), Context())
    threads = sweep(program, chosen, data, Halve(), Context(jobs=4))
    for name, solved in plain.items():
        assert torch.equal(solved.state["h"], threads[name].state["h"])
        assert solved.info == threads[name].info
    alone = sweep(program, [x for x in chosen if x.name == "q"], data, Halve(), Context())
    (only,) = alone.values()
    assert only.info in [solved.info for solved in plain.values()]


def test_activations_beyond_the_budget_go_to_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.ir.calibration import spill

    monkeypatch.setattr(spill, "SMALL", 1)
    program, data = traced(), batches()
    chosen = layers(program, ("linear",))
    plain = sweep(program, chosen, data, Halve(), Context())
    files = sweep(program, chosen, data, Halve(), Context(), budget=0)
    for name, solved in plain.items():
        assert torch.equal(solved.state["h"], files[name].state["h"])
    kept = spill.Spill(100)
    first, second = kept.put(torch.ones(20)), kept.put(torch.arange(20.0))
    assert (kept.held, kept.spilled) == (80, 80)
    assert torch.equal(second, torch.arange(20.0))
    del first
    assert kept.held == 0


def test_a_tied_weight_is_solved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    program, method = traced(Tied()), Halve()
    found = sweep(program, layers(program, ("linear",)), batches(), method, Context())
    assert method.solved == ["first"]
    assert len(found) == 2


def test_padding_tokens_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * attention_mask.unsqueeze(-1)

    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    program = gw.trace(Masked().eval(), {"x": x, "attention_mask": mask})
    (found,) = sweep(
        program, layers(program, ("linear",)), [(x, mask)], Halve(), Context()
    ).values()
    real = x[mask.bool()].double()
    torch.testing.assert_close(
        found.state["h"][0].double(), real.T @ real / 8, rtol=1e-5, atol=1e-6
    )


def test_a_killed_walk_goes_on_behind_the_last_finished_layer(tmp_path: Path) -> None:
    class Dies(Halve):
        def __init__(self, at: str) -> None:
            super().__init__()
            self.at = at

        def solve(self, task: Task) -> Solved:
            if task.name == self.at:
                raise KeyboardInterrupt
            return super().solve(task)

    program, data = traced(), batches()
    chosen = layers(program, ("linear",))
    context = Context(work=tmp_path, key="one")
    with pytest.raises(KeyboardInterrupt):
        sweep(program, chosen, data, Dies("up"), context)
    again = Dies("nothing")
    found = sweep(program, chosen, data, again, context)
    assert again.solved == ["up", "down"]
    plain = sweep(program, chosen, data, Halve(), Context())
    for name, solved in plain.items():
        assert torch.equal(solved.state["h"], found[name].state["h"])
    other = Dies("nothing")
    sweep(program, chosen, data, other, Context(work=tmp_path, key="another"))
    assert len(other.solved) == 6


def test_the_walk_ends_at_the_last_layer_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, data = traced(), batches()
    chosen = layers(program, ("linear",))
    context = Context(work=tmp_path, key="one")
    first = sweep(program, chosen, data, Halve(), context)
    walked: list[str] = []
    step = _Sweep._step

    def noted(self: _Sweep, node: torch.fx.Node) -> None:
        walked.append(node.name)
        step(self, node)

    monkeypatch.setattr(_Sweep, "_step", noted)
    again = sweep(program, chosen, data, Halve(), context)
    assert walked == []
    assert list(again) == list(first)
    store = LayerStore.of(context, program, Halve()).folder
    assert store is not None
    sizes = {file: file.read_bytes() for file in store.iterdir()}
    assert len(sizes) == len(chosen)
    told: list[str] = []
    for file, whole in sizes.items():  # one bit of a weight: the archive can still be read
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert LayerStore(store, told.append).load("o") is None or told == []
        if told:
            break
        file.write_bytes(whole)
    assert "layer 'o' of an earlier run is damaged" in told[0]
    assert len(told) == 1
    method = Halve()
    again = sweep(program, chosen, data, method, context)
    o = next(layer.node.name for layer in chosen if layer.name == "o")
    assert method.solved == ["o"]
    assert walked[-1] == o
    for name, solved in first.items():
        assert torch.equal(solved.state["h"], again[name].state["h"])


def test_a_site_shows_other_values_too() -> None:
    seen: list[torch.Tensor] = []

    class Looks(Halve):
        def gather(self, site: Site) -> Any:
            if site.layers[0].name == "o":
                seen.extend(site.values(next(iter(program.graph.find_nodes(op="placeholder")))))
            return super().gather(site)

    program, data = traced(), batches()
    sweep(program, layers(program, ("linear",)), data, Looks(), Context())
    assert all(torch.equal(a, b) for a, (b,) in zip(seen, data, strict=True))


def test_a_solved_bias_and_grid_are_used_behind_it() -> None:
    class Moves(Halve):
        def solve(self, task: Task) -> Solved:
            self.solved.append(task.name)
            return Solved(bias=task.bias + 1, grid=(0.5, 2, 0, 7))

    chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    program = gw.trace(chain, (torch.randn(2, 5, 8),))
    method, (x,) = Moves(), batches()[0]
    sweep(program, layers(program, ("linear",)), [(x,)], method, Context())
    rounded = (torch.clamp(torch.round(x / 0.5) + 2, 0, 7) - 2) * 0.5
    first = torch.nn.functional.linear(rounded, program.state["0.weight"], program.state["0.bias"])
    torch.testing.assert_close(method.seen["2"][0], torch.relu(first + 1))


def test_bad_data_is_refused_with_the_layer_and_the_batch() -> None:
    program = traced()
    chosen = layers(program, ("linear",))
    with pytest.raises(ArgumentError, match="calibration data is empty"):
        sweep(program, chosen, [], Halve(), Context())
    bad = [*batches(1), (torch.full((2, 5, 8), float("nan")),)]
    with pytest.raises(ModelError, match="batch 1 gives NaN or infinity in front of 'q'"):
        sweep(program, chosen, bad, Halve(), Context())
