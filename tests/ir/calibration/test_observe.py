from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.calibration.observe import Channels, Rows, Several, bound_batches, observe
from graphwright.ir.calibration.ranges import range_observer
from graphwright.ir.errors import GraphwrightError, ModelError


def test_observers_see_every_batch_of_the_nodes_they_watch() -> None:
    program = gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),), {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    watch = range_observer("min_max", 99.9)
    batches = [(torch.randn(2, 3),), (torch.randn(5, 3),)]
    observe(program, {node.name: watch}, batches)
    values = torch.cat([program(*b) for b in batches]).detach()
    assert watch.range() == (pytest.approx(float(values.min())), pytest.approx(float(values.max())))


def test_nan_and_no_batch_at_all_are_refused() -> None:
    program = gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),), {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    for batches in ([], [(torch.full((2, 3), float("nan")),)]):
        watch = range_observer("min_max", 99.9)
        with pytest.raises(GraphwrightError):
            observe(program, {node.name: watch}, batches)


def test_extremes_are_those_of_all_batches_by_channel() -> None:
    watch = Channels()
    batches = [torch.randn(2, 5, 3), torch.randn(4, 5, 3), 0.1 * torch.randn(1, 5, 3)]
    for batch in batches:
        watch.update(batch)
    rows = torch.cat([batch.reshape(-1, 3) for batch in batches])
    assert watch.low is not None
    assert watch.high is not None
    assert torch.equal(watch.low, rows.amin(0))
    assert torch.equal(watch.high, rows.amax(0))


def test_rows_are_spread_evenly_and_limited_by_batch_and_in_all() -> None:
    watch = Rows(limit=7, per_batch=4)
    first = torch.arange(10.0)[:, None].expand(10, 2)
    watch.update(first)
    assert watch.rows()[:, 0].tolist() == [0.0, 2.0, 5.0, 7.0]  # 10 k / 4, rounded down
    watch.update(100 + first[:2])  # fewer rows than would be kept
    watch.update(200 + first)  # one more until there are seven
    watch.update(300 + first)
    assert watch.rows()[4:, 0].tolist() == [100.0, 101.0, 200.0]


def test_what_is_kept_does_not_follow_the_value_it_came_from() -> None:
    watch, both = Rows(limit=4, per_batch=4), Rows(limit=2, per_batch=2)
    value = torch.zeros(4, 2)
    Several(watch, both).update(value)
    value += 1
    assert float(watch.rows().sum()) == 0
    assert len(both.rows()) == 2


def test_batches_are_counted_and_told_as_they_are_seen() -> None:
    program = gw.trace(nn.Linear(3, 2), {"input": torch.randn(4, 3)}, {"input": {0: "n"}})
    batches = [{"input": torch.randn(2, 3)}, (torch.randn(5, 3),)]
    told: list[tuple[str, int, int]] = []
    assert observe(program, {}, batches, lambda *said: told.append(said)) == 2
    assert told == [("calibrating", 1, 2), ("calibrating", 2, 2)]
    told.clear()
    observe(program, {}, iter(batches), lambda *said: told.append(said))  # of unknown length
    assert told == [("calibrating", 1, 1), ("calibrating", 2, 2)]
    assert [len(inputs[0]) for inputs in bound_batches(program, batches)] == [2, 5]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * attention_mask[..., None]


@pytest.mark.parametrize("padding", [True, False])
def test_padding_tokens_are_shown_only_where_they_are_asked_for(padding: bool) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    dims = {name: {0: "n", 1: "length"} for name in ("x", "attention_mask")}
    inputs = {"x": torch.randn(2, 4, 3), "attention_mask": mask}
    program = gw.trace(Masked(), inputs, dynamic=dims)
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    watch = Rows(limit=100, per_batch=100)
    observe(program, {node.name: watch}, [inputs], padding=padding)
    assert len(watch.rows()) == (8 if padding else 5)


def test_padding_is_shown_where_nothing_is_said_and_where_there_is_nothing_else() -> None:
    dims = {name: {0: "n", 1: "length"} for name in ("x", "attention_mask")}
    inputs = {"x": torch.randn(2, 4, 3), "attention_mask": torch.tensor([[1, 1, 0, 0]] * 2)}
    program = gw.trace(Masked(), inputs, dynamic=dims)
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    watch = Rows(limit=100, per_batch=100)
    observe(program, {node.name: watch}, [inputs])
    assert len(watch.rows()) == 8
    empty = inputs | {"attention_mask": torch.zeros(2, 4, dtype=torch.int64)}
    alone = Rows(limit=100, per_batch=100)
    observe(program, {node.name: alone}, [empty], padding=False)
    assert len(alone.rows()) == 8  # better than to know nothing


class Cut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.split(2, dim=1)
        return torch.cat([first, second, x[:, 4:]], 1)


def test_an_empty_value_is_refused_in_its_own_words_and_a_list_of_tensors_passed_over() -> None:
    program = gw.trace(Cut(), {"x": torch.randn(4, 4)}, dynamic={"x": {0: "n"}})
    batches = [(torch.randn(2, 4),)]
    names = {str(n.target).split(".")[1]: n.name for n in program.graph.nodes
             if n.op == "call_function" and "aten" in str(n.target)}  # fmt: skip
    assert observe(program, {names["split"]: Channels()}, batches) == 1
    with pytest.raises(ModelError, match="batch 0 gives an empty tensor at 'slice"):
        observe(program, {names["slice"]: Channels()}, batches)


def test_the_node_and_the_batch_of_a_bad_value_are_named() -> None:
    program = gw.trace(nn.Linear(3, 2), {"input": torch.randn(4, 3)}, {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    batches = [(torch.randn(2, 3),), (torch.full((2, 3), float("inf")),)]
    with pytest.raises(ModelError, match=f"batch 1 gives NaN or infinity at '{node.name}'"):
        observe(program, {node.name: Channels()}, batches)
