"""Work kept for a later run comes back as it was written, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from graphwright.ir.kept import keep, kept

STATE = {"step": 3, "weight": torch.arange(6.0)}


def silent(text: str) -> None:
    raise AssertionError(text)


def test_the_last_state_comes_back_alone(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"made\xff")
    assert kept(folder, "tune", "training", silent) is None
    for step in (1, 2, 2, 3):
        keep(folder, "tune", {**STATE, "step": step}, "training", silent)
    keep(folder, "tune2", {"step": 9}, "training", silent)
    found = kept(folder, "tune", "training", silent)
    assert found["step"] == 3
    assert torch.equal(found["weight"], STATE["weight"])
    assert len(list(folder.iterdir())) == 2


def test_every_flipped_bit_is_found_out(tmp_path: Path) -> None:
    keep(tmp_path, "x", STATE, "layer 'x'", silent)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        told: list[str] = []
        assert kept(tmp_path, "x", "layer 'x'", told.append) is None
        assert len(told) == 1
        assert told[0].startswith("layer 'x' of an earlier run is damaged and is computed again")
        assert not file.exists()  # it is told of once
        assert kept(tmp_path, "x", "layer 'x'", silent) is None


def test_where_the_newest_is_damaged_an_older_one_serves(tmp_path: Path) -> None:
    """As after a kill between the writing of the new file and the removal of the old."""
    keep(tmp_path, "x", {"step": 1}, "x", silent)
    (old,) = tmp_path.iterdir()
    content = old.read_bytes()
    keep(tmp_path, "x", {"step": 2}, "x", silent)
    (new,) = tmp_path.iterdir()
    old.write_bytes(content)
    new.write_bytes(new.read_bytes()[:-9])
    told: list[str] = []
    assert kept(tmp_path, "x", "x", told.append) == {"step": 1}
    assert len(told) == 1


def test_a_full_disk_costs_the_file_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, "x", {"step": 1}, "layer 'x'", silent)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    told: list[str] = []
    keep(tmp_path, "x", {"step": 2}, "layer 'x'", told.append)
    assert len(told) == 1
    assert told[0].startswith("layer 'x' is not kept for a later run: ")
    assert kept(tmp_path, "x", "layer 'x'", silent) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1
