"""From a loaded model and the inputs that a spec declares to a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.model import LoadedModel
from graphwright.job.build import build_program, example_inputs, example_sizes
from graphwright.specs.sections import InputSection, ModelSection


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(self.table(ids) * attention_mask[..., None])


def tokens(**more: Any) -> dict[str, InputSection]:
    shape = ("batch", "seq")
    return {
        "ids": InputSection(dtype="int64", shape=shape, range=(0, 11), **more),
        "attention_mask": InputSection(dtype="int64", shape=shape),
    }


def loaded(inputs: dict[str, dict[str, Any]] | None = None) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(Path("net.pt"), "a module", "", 0, module=Embed().eval(), inputs=inputs)


def test_sizes_that_nobody_gives_are_two_samples_and_eight_of_the_rest() -> None:
    assert example_sizes(tokens()) == {"batch": 2, "seq": 8}
    assert example_sizes(tokens(example=(5, 6))) == {"batch": 5, "seq": 6}
    fixed = {"x": InputSection(dtype="float32", shape=(3, "n"))}
    assert example_sizes(fixed) == {"n": 8}


def test_an_example_wins_over_the_input_that_has_none() -> None:
    swapped = dict(reversed(tokens(example=(3, 7)).items()))
    first = {**swapped, "ids": tokens(example=(2, 8))["ids"]}
    assert example_sizes(first) == {"batch": 2, "seq": 8}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (tokens(example=(1, 6)), "dimension 'batch' has the example size 1"),
        ({"x": InputSection(dtype="float32", shape=("n", "n"), example=(3, 4))},
         "dimension 'n' has the example sizes 3 and 4"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_are_refused(inputs: dict[str, InputSection], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        example_sizes(inputs)


def test_examples_lie_in_their_ranges_and_follow_the_seed() -> None:
    made = [example_inputs(tokens(example=(16, 9)), seed) for seed in (3, 3, 4)]
    ids, mask = made[0]["ids"], made[0]["attention_mask"]
    assert (ids.shape, ids.dtype) == ((16, 9), torch.int64)
    assert (int(ids.min()), int(ids.max())) == (0, 10)
    assert set(mask.unique().tolist()) <= {0, 1}
    assert bool((mask[:, 1:] <= mask[:, :-1]).all())  # padded on the right
    assert torch.equal(ids, made[1]["ids"])
    assert not torch.equal(ids, made[2]["ids"])
    number = example_inputs({"scale": InputSection(dtype="float32", shape=())}, 0)
    assert number["scale"].shape == ()


def test_the_program_has_the_declared_inputs() -> None:
    section = ModelSection(inputs=tokens(example=(3, 5)))
    program = build_program(loaded(), section, seed=0)
    ids, mask = program.signature.inputs
    assert (ids.name, ids.shape, ids.range) == ("ids", ("batch", "seq"), (0, 11))
    assert mask.range is None
    assert program.examples[0].shape == (3, 5)


def test_a_file_that_tells_its_inputs_needs_no_section_and_a_section_wins() -> None:
    own = {name: spec.model_dump() for name, spec in tokens(example=(4, 6)).items()}
    assert build_program(loaded(own), ModelSection(), 0).examples[0].shape == (4, 6)
    section = ModelSection(inputs=tokens(example=(2, 3)))
    assert build_program(loaded(own), section, 0).examples[0].shape == (2, 3)
    with pytest.raises(ModelError, match="does not say what inputs"):
        build_program(loaded(), ModelSection(), 0)
    with pytest.raises(ModelError, match=r"net\.pt holds no model"):
        build_program(LoadedModel(Path("net.pt"), "", "", 0), section, 0)
