"""A checkpoint is used when it is whole and of this very chain, and never otherwise."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.job.checkpoint import Checkpoints, chain_key, file_sha256

KEYS = ["a" * 64, "b" * 64, "c" * 64]


@pytest.fixture(scope="module")
def programs() -> list[gw.Program]:
    torch.manual_seed(0)
    return [gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),)) for _ in range(2)]


def weight(program: gw.Program | None) -> torch.Tensor:
    assert program is not None
    return program.state["weight"]


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_the_stored_step_comes_back_with_its_records(
    tmp_path: Path, programs: list[gw.Program]
) -> None:
    found = Checkpoints(tmp_path / "c")
    assert found.load(KEYS, no_warning) is None
    found.save(0, KEYS[0], programs[1], [], None)
    found.save(1, KEYS[1], programs[0], [{"id": "x"}], None)
    loaded = found.load(KEYS, no_warning)
    assert loaded is not None
    index, program, records, uncompressed = loaded
    assert (index, records, uncompressed) == (1, [{"id": "x"}], None)
    assert torch.equal(weight(program), weight(programs[0]))
    assert len(list((tmp_path / "c").glob("*.pt2"))) == 1  # the older step is gone
    assert found.load([KEYS[0], KEYS[2]], no_warning) is None


def test_the_uncompressed_program_is_kept_where_it_is_another(
    tmp_path: Path, programs: list[gw.Program]
) -> None:
    found = Checkpoints(tmp_path)
    one, two = programs
    found.save(2, KEYS[2], one, [], two)
    loaded = found.load(KEYS, no_warning)
    assert loaded is not None
    assert torch.equal(weight(loaded[1]), weight(one))
    assert torch.equal(weight(loaded[3]), weight(two))
    found.save(2, KEYS[2], one, [], one)
    loaded = found.load(KEYS, no_warning)
    assert loaded is not None
    assert torch.equal(weight(loaded[3]), weight(one))


def signed(entry: object) -> bytes:
    """A manifest as it is written."""
    text = json.dumps(entry).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def test_a_damaged_checkpoint_counts_as_none_and_is_told(
    tmp_path: Path, programs: list[gw.Program]
) -> None:
    found = Checkpoints(tmp_path)
    found.save(0, KEYS[0], programs[0], [{"id": "x", "seconds": 12}], None)
    for file in (*tmp_path.glob("*.pt2"), tmp_path / "manifest.json"):
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            told: list[str] = []
            assert found.load(KEYS, told.append) is None
            assert len(told) == 1
            assert file.name in told[0]
            assert "damaged" in told[0]
        for cut in (b"", whole[:10], whole[:-1]):
            told = []
            file.write_bytes(cut)
            assert found.load(KEYS, told.append) is None
            assert len(told) == 1
        file.write_bytes(whole)
        assert found.load(KEYS, no_warning) is not None


def test_a_checkpoint_without_its_program_is_told(
    tmp_path: Path, programs: list[gw.Program]
) -> None:
    found = Checkpoints(tmp_path)
    found.save(0, KEYS[0], programs[0], [], None)
    (file,) = tmp_path.glob("*.pt2")
    file.unlink()
    told: list[str] = []
    assert found.load(KEYS, told.append) is None
    assert "No such file" in told[0]


def test_one_of_another_chain_is_nothing_to_tell(
    tmp_path: Path, programs: list[gw.Program]
) -> None:
    Checkpoints(tmp_path).save(0, "d" * 64, programs[0], [], None)
    assert Checkpoints(tmp_path).load(KEYS, no_warning) is None


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, programs: list[gw.Program]) -> None:
    """Such as a program that another version wrote."""
    found = Checkpoints(tmp_path)
    found.save(0, KEYS[0], programs[0], [], None)
    (file,) = tmp_path.glob("*.pt2")
    file.write_bytes(b"no archive")
    entry = {"key": KEYS[0], "files": [[file.name, file_sha256(file)]], "uncompressed": None,
             "records": []}  # fmt: skip
    (tmp_path / "manifest.json").write_bytes(signed(entry))
    told: list[str] = []
    assert found.load(KEYS, told.append) is None
    assert len(told) == 1
    assert file.name in told[0]


def test_a_key_depends_on_all_that_it_is_given() -> None:
    keys = {
        chain_key("", a=1), chain_key("x", a=1), chain_key("", a=2), chain_key("", b=1),
        chain_key("", a=1, b=1), chain_key(""),
    }  # fmt: skip
    assert len(keys) == 6
    assert chain_key("x", a=1, b=2) == chain_key("x", b=2, a=1)


def test_a_work_folder_whose_name_is_no_text_costs_the_resume_only(
    tmp_path: Path, programs: list[gw.Program]
) -> None:
    found = Checkpoints(tmp_path / os.fsdecode(b"out\xff"))
    found.save(0, KEYS[0], programs[0], [], None)
    told: list[str] = []
    assert found.load(KEYS, told.append) is None
    assert "not UTF-8" in told[0]
    told[0].encode()
