"""The output folder: taken by one run at a time, replaced as a whole, never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphwright.ir.errors import ArgumentError
from graphwright.job.place import OutputPlace


def finished(folder: Path, text: str) -> None:
    """An earlier result."""
    folder.mkdir()
    for name in ("report.json", "spec.lock.yaml"):
        (folder / name).write_text(text)


def test_a_result_replaces_an_earlier_one_as_a_whole(tmp_path: Path) -> None:
    finished(tmp_path / "out", "old")
    (tmp_path / "out" / "left.onnx").write_text("old")
    place = OutputPlace(tmp_path / "out")
    with place.locked():
        staging = place.fresh_staging()
        (staging / "report.json").write_text("new")
        place.publish()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


@pytest.mark.parametrize("missing", ["report.json", "spec.lock.yaml"])
def test_a_folder_that_is_no_result_is_not_replaced(tmp_path: Path, missing: str) -> None:
    finished(tmp_path / "out", "old")
    (tmp_path / "out" / missing).unlink()
    with (
        pytest.raises(ArgumentError, match="holds other files"),
        OutputPlace(tmp_path / "out").locked(),
    ):
        pass
    assert any((tmp_path / "out").iterdir())


def test_an_empty_folder_is_fine_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with OutputPlace(tmp_path / "empty").locked():
        assert (tmp_path / ".empty.graphwright").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file"), OutputPlace(tmp_path / "file").locked():
        pass


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first, second = OutputPlace(tmp_path / "out"), OutputPlace(tmp_path / "out")
    with first.locked():
        with pytest.raises(ArgumentError, match="another run is writing"), second.locked():
            pass
        assert first.work.is_dir()  # the refused run took nothing away
    with second.locked():
        pass


@pytest.mark.parametrize("kept", ["checkpoints", "passes", "result"])
def test_what_a_later_run_can_use_stays(tmp_path: Path, kept: str) -> None:
    place = OutputPlace(tmp_path / "out")
    with place.locked():
        (place.work / kept).mkdir()
    assert (place.work / kept).is_dir()
    (place.work / kept).rmdir()
    with place.locked():
        pass
    assert not place.work.exists()


def test_staging_starts_empty_and_passes_have_folders_of_their_own(tmp_path: Path) -> None:
    place = OutputPlace(tmp_path / "out")
    (place.fresh_staging() / "left").write_text("")
    assert list(place.fresh_staging().iterdir()) == []
    assert place.pass_work(3).relative_to(place.work) == Path("passes/003")
    place.pass_work(3).mkdir(parents=True)
    place.drop_pass_work()
    assert not place.pass_work(3).exists()


@pytest.mark.parametrize(("world", "rank", "main"), [
    ("1", "1", True), ("2", "0", True), ("2", "1", False),
])  # fmt: skip
def test_of_several_processes_the_first_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, rank: str, main: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)
    place = OutputPlace(tmp_path / "out")
    assert place.is_main == main
    place.pass_work(0).mkdir(parents=True)
    place.drop_pass_work()
    assert place.pass_work(0).exists() != main
    with place.locked():
        assert (place.work / "lock").exists() == main
