"""A checkpoint belongs to the very code that made it."""

from __future__ import annotations

from pathlib import Path

from graphwright.job.environment import own_code, sources_digest


def test_every_source_file_counts(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("")
    first = sources_digest([tmp_path])
    assert sources_digest([tmp_path]) == first
    (tmp_path / "notes.txt").write_text("nothing that runs")
    assert sources_digest([tmp_path]) == first
    (tmp_path / "part" / "a.py").write_text("x = 2\n")
    changed = sources_digest([tmp_path])
    (tmp_path / "part" / "a.py").rename(tmp_path / "part" / "c.py")
    assert len({first, changed, sources_digest([tmp_path])}) == 3


def test_our_own_files_have_one_digest() -> None:
    assert len(own_code()) == 64
