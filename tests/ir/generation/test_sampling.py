"""Scores and the sets that samples come from, against transformers' logits processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.generation.sampling import (
    candidates,
    choose,
    penalize,
    refuse_broken,
    streams_of,
)
from graphwright.ir.generation.settings import Settings, resolve, unmet

processors = pytest.importorskip("transformers.generation.logits_process")


def logits(rows: int = 4, vocabulary: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, vocabulary, generator=generator) * 3


def test_the_repetition_penalty_is_transformers() -> None:
    scores = logits(2)
    tokens = [[3, 5, 5, 400], [7, 0, 3, 3]]
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.4)
    assert torch.equal(penalize(scores, tokens, 1.4), theirs(torch.tensor(tokens), scores.clone()))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 20},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"temperature": 1.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.3, "top_k": 600, "top_p": 0.5},
    ],
)
def test_the_set_of_a_sample_is_transformers(options: dict[str, Any]) -> None:
    warpers = {
        "temperature": processors.TemperatureLogitsWarper,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
    }
    scores = logits()
    for name, value in options.items():
        scores = warpers[name](value)(torch.zeros(4, 1, dtype=torch.long), scores)
    settings = resolve(options, {})
    for row, theirs in zip(logits(), scores, strict=True):
        ids, probabilities = candidates(row, settings)
        assert torch.equal(ids, torch.nonzero(torch.isfinite(theirs)).squeeze(1))
        torch.testing.assert_close(probabilities, theirs.softmax(0)[ids], rtol=1e-5, atol=1e-7)


def test_ties_with_the_kth_token_stay() -> None:
    row = torch.tensor([1.0, 4.0, 2.0, 2.0, 2.0])
    ids, _ = candidates(row, resolve({"top_k": 2}, {}))
    assert ids.tolist() == [1, 2, 3, 4]


def test_samples_follow_the_probabilities() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, -1.0])
    settings = resolve({"temperature": 1.0}, {})
    streams = streams_of(0, 6_000)
    drawn = torch.tensor(choose(row.expand(len(streams), 4), settings, streams))
    share = torch.bincount(drawn, minlength=4) / len(streams)
    assert float((share - row.softmax(0)).abs().max()) < 0.02


def test_the_most_probable_token_is_the_lowest_of_equal_ones() -> None:
    row = torch.tensor([[0.0, 5.0, 5.0, 1.0]])
    assert choose(row, resolve({}, {}), []) == [1]
    assert choose(row, resolve({"temperature": 0.0, "top_k": 7}, {}), []) == [1]


def test_logits_that_are_no_numbers_are_refused() -> None:
    broken = torch.zeros(2, 3)
    broken[1, 2] = float("nan")
    refuse_broken(broken, [0])
    with pytest.raises(ModelError, match="not finite"):
        refuse_broken(broken, [0, 1])


@pytest.mark.parametrize(
    ("given", "defaults", "samples", "beams"),
    [
        ({}, {}, False, 1),
        ({"top_k": 5}, {}, True, 1),
        ({}, {"do_sample": True, "top_k": 7}, True, 1),
        ({"do_sample": False}, {"do_sample": True, "top_k": 7, "temperature": 0.6}, False, 1),
        ({"num_beams": 2}, {"do_sample": True, "temperature": 0.6}, False, 2),
        ({}, {"num_beams": 4, "length_penalty": 2.0}, False, 4),
        ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 2.0}, False, 1),
        ({"temperature": 0.5}, {"num_beams": 4}, True, 1),
        ({"temperature": 0.0}, {"do_sample": True, "top_p": 0.9}, False, 1),
    ],
)
def test_a_models_own_defaults_hold_where_the_call_says_nothing(
    given: dict[str, Any], defaults: dict[str, Any], samples: bool, beams: int
) -> None:
    settings = resolve(given, defaults)
    assert (settings.samples, settings.num_beams) == (samples, beams)
    if not samples:
        assert (settings.temperature, settings.top_k, settings.top_p) == (1.0, 0, 1.0)
    elif "top_k" in defaults:
        assert settings.top_k == 7


def test_defaults_that_have_no_part_are_named() -> None:
    defaults = {"typical_p": 0.9, "epsilon_cutoff": 0.0, "force_words_ids": [[5]], "top_k": 50}
    assert unmet(defaults) == ["typical_p = 0.9", "force_words_ids = [[5]]"]


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"generate: top_p: .*less than or equal to 1"):
        resolve({"top_p": 1.5}, {})
    assert Settings().num_beams == 1
