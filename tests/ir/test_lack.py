"""What the machine lacks is told as such, with a way out, wherever it shows; nothing else is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graphwright.ir.atomic import replacing
from graphwright.ir.errors import ContractError, GraphwrightError, ModelError, ResourceError
from graphwright.ir.lack import lack, lacks_told

MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 8.00 TiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 4096 bytes."),
    RuntimeError("could not create a primitive"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libx.so: failed to map segment from shared object"),
    type("Fail", (Exception,), {})("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation"),
]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY)
def test_memory(error: Exception) -> None:
    found = lack(error)
    assert found is not None
    assert found.exit_code == 2
    assert found.message.startswith("not enough memory")
    assert "smaller batches" in found.fix


def test_torch_itself_says_so() -> None:
    with pytest.raises(ResourceError, match="not enough memory"), lacks_told():
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(("code", "fix"), [
    (errno.ENOSPC, "Free some space"), (errno.EDQUOT, "Free some space"),
    (errno.EFBIG, "ulimit -f"), (errno.EROFS, "can be written"), (errno.EACCES, "can be written"),
    (errno.ENAMETOOLONG, "shorter --out"), (errno.EMFILE, "ulimit -n"),
])  # fmt: skip
def test_files(code: int, fix: str) -> None:
    with pytest.raises(ResourceError) as caught, lacks_told():
        raise OSError(code, "no", "/there/file")
    assert caught.value.message == "/there/file: no"
    assert fix in caught.value.fix


def test_both_names_of_a_rename_and_names_that_are_no_text() -> None:
    found = lack(OSError(errno.EXDEV, "Invalid cross-device link", b"/a\xff", None, "/b"))
    assert found is not None
    assert found.message == "/a\udcff -> /b: Invalid cross-device link"


def test_errors_of_writers_that_are_no_oserror() -> None:
    found = lack(RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"))
    assert found is not None
    assert "could not be written" in found.message


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("memory"), RuntimeError("size 3")])
def test_bugs_stay_bugs(error: Exception) -> None:
    assert lack(error) is None
    with pytest.raises(type(error)), lacks_told():
        raise error


def wrapped(outer: GraphwrightError, fails: Callable[[], object]) -> None:
    """Raises `outer` from what fails."""
    try:
        fails()
    except (RuntimeError, OSError) as error:
        raise outer from error


def test_a_pass_is_not_blamed_for_memory() -> None:
    """What found no memory was wrapped as a broken contract on its way."""
    with pytest.raises(ResourceError, match="not enough memory"), lacks_told():
        wrapped(ContractError("it fails"), lambda: torch.empty(1 << 60, dtype=torch.uint8))


def test_own_errors_about_files_stay_as_they_are() -> None:
    with pytest.raises(ModelError, match="no such file"), lacks_told():
        wrapped(ModelError("no such file"), Path("/nowhere").read_text)
    once = ResourceError("not enough memory")
    with pytest.raises(GraphwrightError) as caught, lacks_told():
        raise once
    assert caught.value is once


class _Full:
    """A disk that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: object) -> int:
        self.room -= memoryview(data).nbytes  # type: ignore[arg-type]
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return memoryview(data).nbytes  # type: ignore[arg-type]


def save_to(path: Path, disk: _Full) -> None:
    with replacing(path) as file:
        file.file = disk  # type: ignore[attr-defined]
        torch.save({"weight": torch.zeros(1000)}, file)


@pytest.mark.parametrize("room", [0, 100, 1000, 3000])
def test_a_write_that_fails_inside_torch_is_an_error_and_not_the_end(
    tmp_path: Path, room: int
) -> None:
    """Torch's writer, closed after a failed write, ends the process."""
    path = tmp_path / "x.pt"
    path.write_text("earlier")
    with pytest.raises(OSError, match="No space left") as caught:
        save_to(path, _Full(room))
    assert caught.value.filename == str(path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
