"""A program that came out of a file is the program that went in: a resumed run ends the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import every_pass

import graphwright as gw
from graphwright.passes.registry import pass_ids

# They take what they insert out of a file: adapters of PEFT, and a manifold of resize.neumeta.
FROM_FILES = ("adapt.load", "resize.resample")
NAMES = [name for name in pass_ids() if name not in FROM_FILES]


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_does_the_same_to_a_program_out_of_a_file(name: str, tmp_path: Path) -> None:
    """And what it makes is saved in the bytes in which it is saved once it was loaded."""
    given = every_pass.before_last(name)
    result = every_pass.run_last(name, given)
    result.save(tmp_path / "straight.pt2")
    straight = (tmp_path / "straight.pt2").read_bytes()

    gw.load(tmp_path / "straight.pt2").save(tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == straight

    given.save(tmp_path / "given.pt2")
    every_pass.run_last(name, gw.load(tmp_path / "given.pt2")).save(tmp_path / "resumed.pt2")
    assert (tmp_path / "resumed.pt2").read_bytes() == straight
    if name != "cleanup.canonicalize":  # a traced program is canonical
        assert straight != (tmp_path / "given.pt2").read_bytes()
