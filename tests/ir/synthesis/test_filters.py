"""P78's filter, and what the filters of a section do to its images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import stripes

from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.synthesis.filters import (
    Made,
    agreement,
    features_of,
    keep_accepted,
    keep_agreeing,
    keep_predicting,
)
from graphwright.ir.synthesis.source import make_data


def masks(*right: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense logits (n, 2, 1, 10) that name so many of the 10 labelled elements of each sample."""
    labels = torch.ones(len(right), 1, 12, dtype=torch.int64)
    labels[..., 10:] = -100
    seen = torch.zeros(len(right), 1, 12, dtype=torch.int64)
    for row, count in enumerate(right):
        seen[row, 0, :count] = 1
    return torch.nn.functional.one_hot(seen, 2).permute(0, 3, 1, 2).float(), labels


def test_the_share_of_labelled_elements_that_the_model_names():
    logits, labels = masks(0, 5, 10)
    assert agreement(logits, labels).tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-6)


def test_a_share_at_the_threshold_is_not_above_it():
    logits, labels = masks(7, 8)
    assert (agreement(logits, labels) > 0.7).tolist() == [False, True]


def test_a_sample_without_labels_agrees_with_nothing():
    logits, labels = masks(10)
    assert agreement(logits, torch.full_like(labels, -100)).tolist() == [0.0]


def test_of_a_class_its_probability():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    found = agreement(logits, torch.tensor([1, 2]))
    expected = [float(logits[0].softmax(0)[1]), float(logits[1].softmax(0)[2])]
    assert found.tolist() == pytest.approx(expected)


def test_labels_that_are_no_classes_are_told():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert agreement(logits, torch.tensor([1, -100])).tolist()[1] == 0
    with pytest.raises(ModelError, match="labels go beyond the model's 3 classes"):
        agreement(logits, torch.tensor([1, 3]))
    with pytest.raises(ModelError, match=r"takes classes, whole numbers \[2\], and the labels are"):
        agreement(logits, torch.rand(2, 3))
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ModelError, match=r"whole numbers \[2, 4, 4\]"):
        agreement(images, images)


def test_rejected_images_are_what_they_were_made_of():
    x, labels = stripes.images(8, seed=5)
    bad = x.clone()
    bad[:3] = torch.zeros(3, 3, 8, 8)
    made = Made(bad, labels, originals=x)
    sure = agreement(stripes.program()(bad), labels) > 0.7
    assert 0 < int(sure.sum()) < 8
    kept = keep_agreeing(made, stripes.program(), 0.7)
    assert torch.equal(kept.images[~sure], x[~sure])
    assert torch.equal(kept.images[sure], bad[sure])
    assert torch.equal(kept.labels, labels)


def test_rejected_images_of_noise_are_left_out():
    x, labels = stripes.images(8, seed=5)
    wrong = labels.clone()
    wrong[:3] = (labels[:3] + 1) % 4
    kept = keep_agreeing(Made(x, wrong), stripes.program(), 0.5)
    sure = agreement(stripes.program()(x), wrong) > 0.5
    assert not bool(sure[:3].any())
    assert torch.equal(kept.images, x[sure])
    assert torch.equal(kept.labels, wrong[sure])


def test_images_without_labels_have_to_be_seen_as_before():
    x, _ = stripes.images(8, seed=5)
    kept = keep_agreeing(Made(torch.zeros_like(x), None, originals=x), stripes.program(), 0.99)
    before = stripes.program()(x).argmax(1)
    blank = stripes.program()(torch.zeros_like(x)).softmax(1)
    same = blank.gather(1, before[:, None])[:, 0] > 0.99
    assert torch.equal(kept.images[~same], x[~same])


def test_features_are_means_over_places():
    x, _ = stripes.images(6, seed=5)
    expected = stripes.trained()[:7](x).mean((2, 3))
    assert torch.allclose(features_of(stripes.program(), x), expected, atol=1e-6)
    std = stripes.trained()[:7](x).std((2, 3), correction=0)
    both = features_of(stripes.program(), x, spread=True)
    assert torch.allclose(both, torch.cat([expected, std], 1), atol=1e-5)


def test_a_chain_keeps_what_looks_real():
    """Half of the images are of the data, half are noise: the states are mostly of the data."""
    real, _ = stripes.images(160, seed=5)
    good, of_good = stripes.images(80, seed=6)
    noise = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    images = torch.cat([good, noise])[order]
    made = Made(images, torch.cat([of_good, of_good])[order], None, real)
    kept = keep_accepted(made, stripes.program(), Context())
    is_good = [any(torch.equal(image, g) for g in good) for image in kept.images]
    assert sum(is_good) / len(is_good) > 0.8
    assert len(kept.labels) == len(kept.images)


def test_the_best_share_by_both_predictions_is_kept():
    real, _ = stripes.images(24, seed=5)
    good, labels = stripes.images(8, seed=6)
    noise = 4 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = Made(torch.cat([noise, good]), torch.cat([labels, labels]), None, real)
    kept = keep_predicting(made, stripes.program(), 0.5)
    assert len(kept.images) == 8
    assert sum(any(torch.equal(i, g) for g in good) for i in kept.images) >= 6


SECTION = {"source": "bn_synthesis", "samples": 12, "synthesis": {"iterations": 30}}


@pytest.mark.parametrize(
    "more", [{"filter": "metropolis_hastings"}, {"filter": "bidirectional", "keep": 0.25}]
)
def test_sections_filter_beside_real_images(tmp_path, more):
    np.savez(tmp_path / "real.npz", x=stripes.images(30, seed=5)[0].numpy())
    said: list[str] = []
    section = {**SECTION, "data": "real.npz", **more}
    batches = make_data(section, stripes.program(), Context(warn=said.append), tmp_path)
    if more["filter"] == "bidirectional":
        assert batches.samples == 3
        assert said == ["filter: bidirectional keeps 3 of 12 images"]
    assert 2 <= batches.samples <= 12


def test_a_filter_that_leaves_nothing_is_an_error():
    section = {**SECTION, "synthesis": {"iterations": 1, "lr": 1e-6}, "filter": "agreement",
               "threshold": 0.9999}  # fmt: skip
    with pytest.raises(ModelError, match=r"filter: agreement leaves \d of 12 images"):
        make_data(section, stripes.program(), Context())
