"""The output folder: taken by one run at a time, replaced as a whole, never lost."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from graphwright.ir.errors import ArgumentError
from graphwright.job import exchange
from graphwright.job.place import OutputPlace


def finished(folder: Path, text: str) -> None:
    """An earlier result."""
    folder.mkdir()
    for name in ("report.json", "spec.lock.yaml"):
        (folder / name).write_text(text)


def test_a_result_replaces_an_earlier_one_as_a_whole(tmp_path: Path) -> None:
    finished(tmp_path / "out", "old")
    listed = {"files": ["report.json", "spec.lock.yaml", "left.onnx"]}
    listed["result"] = {"artifacts": []}
    (tmp_path / "out" / "report.json").write_text(json.dumps(listed))
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


def compile_to(out: Path, **files: str) -> list[str]:
    """A run that writes these files beside the report."""
    place = OutputPlace(out)
    with place.locked():
        staging = place.fresh_staging()
        names = ["report.json", "spec.lock.yaml", *files]
        for name in files:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(files[name])
        (staging / "spec.lock.yaml").write_text("")
        report = {"files": names, "result": {"artifacts": []}}
        (staging / "report.json").write_text(json.dumps(report))
        return place.publish()


@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("has_links", [True, False])
def test_files_of_the_user_in_an_earlier_result_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool, has_links: bool
) -> None:
    if not has_exchange:
        monkeypatch.setattr(exchange, "_exchanged", lambda *_: False)
    if not has_links:

        def no_link(*_: object) -> None:
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(exchange.os, "link", no_link)
    out = tmp_path / "out"
    assert compile_to(out, **{"model.onnx": "1", "only.first": "1"}) == []
    (out / "notes.md").write_text("mine")
    (out / "figures").mkdir()
    (out / "figures" / "a.png").write_text("mine")
    (out / "empty").mkdir()
    (out / "link").symlink_to("nowhere")
    (out / "later.onnx").write_text("mine")
    kept = compile_to(out, **{"model.onnx": "2", "later.onnx": "2"})
    assert kept == ["empty", "figures/a.png", "later.onnx.kept", "link", "notes.md"]
    found = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    assert found == {
        "figures/a.png", "later.onnx", "later.onnx.kept", "link", "model.onnx", "notes.md",
        "report.json", "spec.lock.yaml",
    }  # fmt: skip
    assert (out / "model.onnx").read_text() == (out / "later.onnx").read_text() == "2"
    assert (
        (out / "later.onnx.kept").read_text() == (out / "figures" / "a.png").read_text() == "mine"
    )
    assert (out / "empty").is_dir()
    assert os.readlink(out / "link") == "nowhere"
    assert compile_to(out, **{"model.onnx": "3"}) == kept
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_there_is_an_output_folder_at_every_moment(tmp_path: Path) -> None:
    """A reader that never stops looking sees one result or the other."""
    out = tmp_path / "out"
    compile_to(out, **{"model.onnx": "0"})
    missing, ended = [], threading.Event()

    def look() -> None:
        while not ended.is_set():
            try:
                (out / "model.onnx").read_text()
            except FileNotFoundError:
                missing.append(out)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(100):
        compile_to(out, **{"model.onnx": str(number)})
    ended.set()
    reader.join()
    assert missing == []
    assert (out / "model.onnx").read_text() == "99"


def test_an_error_of_the_exchange_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compile_to(out, **{"model.onnx": "1"})
    (out / "notes.md").write_text("mine")

    def refused(*_: object) -> bool:
        raise OSError(errno.EACCES, "Permission denied", str(out))

    with monkeypatch.context() as patched:
        patched.setattr(exchange, "_exchanged", refused)
        with pytest.raises(OSError, match="Permission denied"):
            compile_to(out, **{"model.onnx": "2"})
    assert (out / "model.onnx").read_text() == "1"
    assert compile_to(out, **{"model.onnx": "3"}) == ["notes.md"]
    assert (out / "notes.md").read_text() == "mine"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for target in ("disk/there", "disk/new"):
        link = tmp_path / f"link-{target[5:]}"
        link.symlink_to(target)
        for number in ("1", "2"):
            compile_to(link, **{"model.onnx": number})
            assert os.readlink(link) == target
            assert (tmp_path / target / "model.onnx").read_text() == number
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["new", "there"]


def test_a_link_and_its_folder_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    with (
        OutputPlace(tmp_path / "real").locked(),
        pytest.raises(ArgumentError, match="another run is writing"),
        OutputPlace(tmp_path / "link").locked(),
    ):
        pass


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ArgumentError, match="mount point"), OutputPlace(tmp_path).locked():
        pass


def test_a_lock_that_another_run_took_away_is_no_lock(tmp_path: Path) -> None:
    """The first run ends, and removes its work folder, between the two steps of the second."""
    place = OutputPlace(tmp_path / "out")
    opened = place._opened_lock
    stale: list[object] = []

    def late() -> object:
        handle = opened()
        if not stale:
            (place.work / "lock").unlink()
            place.work.rmdir()
        stale.append(handle)
        return handle

    place._opened_lock = late  # type: ignore[assignment, method-assign]
    with place.locked():
        assert (place.work / "lock").exists()
        assert len(stale) == 2
        with pytest.raises(ArgumentError), OutputPlace(tmp_path / "out").locked():
            pass
