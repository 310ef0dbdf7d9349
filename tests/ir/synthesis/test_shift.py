"""`source: domain_shift` on small nets: what comes out, for which inputs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.synthesis.source import check_source, make_data


def net(channels: int) -> gw.Program:
    """A denoiser of images with so many channels, 8x8 pixels or what a mosaic of 16x16 packs to."""
    torch.manual_seed(0)
    model = nn.Conv2d(channels, channels, 3, 1, 1).eval()
    return gw.trace(model, (torch.rand(2, channels, 8, 8),), {"input": {0: "batch"}})


def photographs(folder: Path, size: int, **more: np.ndarray) -> dict[str, object]:
    x = np.random.default_rng(0).random((6, 3, size, size), dtype=np.float32)
    np.savez(folder / "day.npz", input=x, **more)
    return {"source": "domain_shift", "data": "day.npz", "batch_size": 4}


def read(section: dict[str, object], program: gw.Program, folder: Path) -> torch.Tensor:
    batches = make_data(section, program, Context(), folder)
    return torch.cat([batch["input"] for batch in batches])


def test_night_images_are_darker_and_the_same_every_time(tmp_path):
    section = photographs(tmp_path, 8)
    found = read({**section, "shift": {"saturated": 0}}, net(3), tmp_path)
    assert found.shape == (6, 3, 8, 8)
    day = torch.from_numpy(np.load(tmp_path / "day.npz")["input"])
    assert float(found.mean()) < 0.8 * float(day.mean())
    assert torch.equal(found, read({**section, "shift": {"saturated": 0}}, net(3), tmp_path))


def test_nothing_asked_for_is_the_data_itself(tmp_path):
    section = photographs(tmp_path, 8)
    found = read({**section, "shift": {"night": False, "noise": False}}, net(3), tmp_path)
    assert torch.equal(found, torch.from_numpy(np.load(tmp_path / "day.npz")["input"]))


@pytest.mark.parametrize(("channels", "size"), [(4, 16), (1, 8), (3, 8)])
def test_a_models_raw_input_is_made_of_rgb(tmp_path, channels, size):
    section = {**photographs(tmp_path, size), "shift": {"raw": True, "night": False}}
    program = net(channels)
    found = read(section, program, tmp_path)
    assert found.shape == (6, channels, 8, 8)
    assert program(found[:2]).shape == (2, channels, 8, 8)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_labels_stay_beside_their_images_and_levels_are_kept(tmp_path):
    section = photographs(tmp_path, 8, labels=np.arange(6))
    levels = {"night": False, "noise": False, "black": -1.0, "white": 3.0}
    batches = make_data({**section, "shift": levels}, net(3), Context(), tmp_path)
    day = torch.from_numpy(np.load(tmp_path / "day.npz")["input"])
    (inputs, labels), _ = batches.labelled()
    assert labels.tolist() == [0, 1, 2, 3]
    assert torch.allclose(inputs["input"], day[:4], atol=1e-6)


def test_values_outside_of_black_and_white_are_refused(tmp_path):
    section = photographs(tmp_path, 8)
    with pytest.raises(ArgumentError, match=r"`black` and `white` are 0 and 0\.5"):
        read({**section, "shift": {"white": 0.5}}, net(3), tmp_path)


@pytest.mark.parametrize(
    ("channels", "shift", "message"),
    [
        (2, {}, "makes images of 3 or 4 channels, and input 'input' takes 2"),
        (1, {}, "makes images of 3 or 4 channels, and input 'input' takes 1"),
        (1, {"raw": True}, "is one plane of a mosaic"),
    ],
)
def test_a_model_of_other_images_is_refused(channels, shift, message):
    section = {"source": "domain_shift", "data": "day.npz", "shift": shift}
    with pytest.raises(ModelError, match=message):
        check_source(section, net(channels))
