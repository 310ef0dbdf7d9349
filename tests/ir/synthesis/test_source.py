"""A section with a `source` as batches: labels, real images to start from, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import stripes
from torch.nn.functional import one_hot

from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.synthesis.source import as_data, check_source, make_data
from graphwright.passes.quantize import Gptq, Int8
from graphwright.passes.tune import Finetune

SECTION = {"source": "bn_synthesis", "samples": 12, "batch_size": 5,
           "synthesis": {"iterations": 3}}  # fmt: skip


def test_a_section_gives_labelled_batches_that_can_be_read_again():
    batches = make_data(SECTION, stripes.program(), Context())
    read = list(batches.labelled())
    assert [len(labels) for _, labels in read] == [5, 5, 2]
    assert batches.has_labels
    assert batches.source == "bn_synthesis"
    assert all(inputs["x"].shape[1:] == (3, 8, 8) for inputs, _ in read)
    again = list(batches.labelled())
    assert all(torch.equal(a["x"], b["x"]) for (a, _), (b, _) in zip(read, again, strict=True))
    inputs, labels = batches.at([11, 0])
    assert torch.equal(inputs["x"][1], read[0][0]["x"][0])
    assert labels[1] == read[0][1][0]


def test_256_images_when_nothing_is_said():
    section = {"source": "bn_synthesis", "synthesis": {"iterations": 1}}
    assert make_data(section, stripes.program(), Context()).samples == 256


def test_soft_labels_are_the_probabilities_of_the_model():
    section = {**SECTION, "synthesis": {"iterations": 3, "labels": "soft"}}
    program = stripes.program()
    for inputs, labels in make_data(section, program, Context()).labelled():
        assert torch.allclose(labels, program(inputs["x"]).softmax(-1), atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_real_images_are_what_synthesis_starts_from(tmp_path, labelled):
    x, _ = stripes.images(5, seed=9)
    given = np.array([3, 2, 1, 0, 3])
    np.savez(tmp_path / "real.npz", x=x.numpy(), **({"labels": given} if labelled else {}))
    section = {**SECTION, "data": "real.npz", "synthesis": {"iterations": 1, "lr": 1e-6}}
    program = stripes.program()
    (images, labels) = (torch.cat(parts) for parts in zip(*(
        (inputs["x"], found)
        for inputs, found in make_data(section, program, Context(), tmp_path).labelled()
    ), strict=True))  # fmt: skip
    rows = torch.arange(12) % 5
    assert torch.allclose(images, x[rows], atol=1e-5)
    seen = torch.from_numpy(given) if labelled else program(x).argmax(-1)
    assert torch.equal(labels, seen[rows])


def test_labels_that_are_no_classes_are_refused(tmp_path):
    x, _ = stripes.images(4)
    np.savez(tmp_path / "real.npz", x=x.numpy(), labels=np.random.rand(4, 2).astype("f"))
    with pytest.raises(ArgumentError, match="are no classes"):
        make_data({**SECTION, "data": "real.npz"}, stripes.program(), Context(), tmp_path)


def test_one_image_is_refused():
    with pytest.raises(ArgumentError, match="ask for 2 or more"):
        check_source({**SECTION, "samples": 1}, stripes.program())


def test_passes_calibrate_and_train_on_them():
    program = stripes.program()
    section = {**SECTION, "samples": 16, "synthesis": {"iterations": 20, "labels": "soft"}}
    batches = make_data(section, program, Context())
    for step in (Int8(activations="static"), Gptq(bits=4, group_size=-1)):
        assert step(program, calibration=batches)(stripes.images(4)[0]).shape == (4, 4)
    tuned = Finetune(tune={"steps": 2, "lr": 1e-4}).execute(
        program, Context(training=batches, teacher=program)
    )
    assert tuned.metrics["steps"] == 2.0


def test_a_batch_of_tensors_is_data():
    x, labels = stripes.images(6)
    soft = one_hot(labels, 4).float()
    data = as_data({"x": x, "labels": soft}, stripes.program(), "made", 4)
    (_, first), _ = data.labelled()
    assert torch.equal(first, soft[:4])
