"""The cache of tile sizes, and the choice by a timer; nothing here needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from graphwright.ir.kernels import low_bit_linear, tuning
from graphwright.ir.kernels.tuning import Cache, Tiles

SMALL, LARGE, LAST = Tiles(16, 64, 128, 4, 4), Tiles(128, 128, 64, 8, 3), Tiles(1, 8, 256, 4, 1, 2)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device of a name, an empty cache, a timer that likes LARGE; gives the cache's file."""
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.setenv(tuning.SWITCH, "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB/HBM3")
    monkeypatch.setattr(tuning, "_is_recording", lambda: False)
    monkeypatch.setattr(tuning, "gpu_time", timer)
    tuning._cache.cache_clear()
    return tmp_path / "tiles-NVIDIA-H100-80GB-HBM3.json"


def timer(call: Callable[[], Any]) -> float:
    """What the fake launch returns is its time."""
    return float(call())


def time_of(tiles: Tiles) -> float:
    return {SMALL: 3.0, LARGE: 1.0, LAST: 2.0}[tiles]


def refuse(tiles: Tiles) -> float:
    raise AssertionError("this may not be launched")


def choose(run: Callable[[Tiles], Any], device: torch.device, *kind: object) -> Tiles:
    return tuning.choose("low_bit", kind or (1, 4096), [SMALL, LARGE, LAST], run, device)


def test_the_fastest_is_chosen_and_of_equal_ones_the_first() -> None:
    assert tuning.fastest([SMALL, LARGE, LAST], time_of, timer) == LARGE
    assert tuning.fastest([SMALL, LARGE, LAST], lambda tiles: 1.0, timer) == SMALL


def test_a_cpu_never_measures(gpu: Path) -> None:
    assert choose(refuse, CPU) == SMALL
    assert not gpu.exists()


def test_without_the_switch_nothing_is_measured(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.SWITCH)
    assert choose(refuse, GPU) == SMALL
    assert not gpu.exists()


def test_while_a_graph_is_captured_nothing_is_measured(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_is_recording", lambda: True)
    assert choose(refuse, GPU) == SMALL
    assert not gpu.exists()


def test_a_choice_is_measured_once_and_read_by_the_next_process(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(time_of, GPU) == LARGE
    assert choose(refuse, GPU) == LARGE
    tuning._cache.cache_clear()  # as a new process
    monkeypatch.delenv(tuning.SWITCH)
    assert choose(refuse, GPU) == LARGE
    assert choose(refuse, GPU, 2, 4096) == SMALL  # another kind


def test_what_another_process_measured_meanwhile_stays(gpu: Path) -> None:
    ours, theirs = Cache(gpu), Cache(gpu)
    theirs.keep("a", LARGE)
    ours.keep("b", LAST)
    assert Cache(gpu).choices == {"a": LARGE, "b": LAST}
    assert [path.name for path in gpu.parent.iterdir()] == [gpu.name]


DAMAGED = {
    "no JSON": "{",
    "another type": "[]",
    "no choices": '{"version": 1}',
    "older": '{"version": 0, "choices": {}}',
    "not text": b"\xff\xfe\x00",
    "a size that is none": json.dumps(
        {"version": 1, "choices": {"low_bit 1 4096": {"block_m": "16"}}}
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_counts_as_none_and_is_replaced(gpu: Path, name: str) -> None:
    content = DAMAGED[name]
    gpu.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert choose(time_of, GPU) == LARGE
    assert list(Cache(gpu).choices.values()) == [LARGE]


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(gpu: Path) -> None:
    Cache(gpu).keep("low_bit 1 4096", Tiles(7, 7, 7, 7, 7))
    assert choose(time_of, GPU) == LARGE


def test_a_folder_that_cannot_be_written_costs_no_result(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.write_text("")
    monkeypatch.setenv(tuning.FOLDER, str(gpu))  # a file
    assert choose(time_of, GPU) == LARGE
    assert choose(refuse, GPU) == LARGE


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tuning.cache_file("A100") == Path("/cache/graphwright/tiles-A100.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_file("A100") == Path.home() / ".cache/graphwright/tiles-A100.json"
    monkeypatch.setenv(tuning.FOLDER, "/mine")
    assert tuning.cache_file("A100") == Path("/mine/tiles-A100.json")


def test_token_counts_share_a_choice_up_to_the_next_power_of_two() -> None:
    assert [tuning.bucket(m) for m in (1, 2, 3, 4, 5, 16, 17, 512)] == [1, 2, 4, 4, 8, 16, 32, 512]


@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 128, 129, 500])
@pytest.mark.parametrize("table", ["", "nf4"])
def test_tokens_of_a_bucket_have_the_same_candidates(m: int, table: str) -> None:
    codes = torch.zeros(64, 32, dtype=torch.uint8)
    packed = low_bit_linear.Packed(codes, torch.ones(64, 1), None, 4, 64, 1, table)
    at_most = low_bit_linear._candidates(tuning.bucket(m), packed)
    assert low_bit_linear._candidates(m, packed) == at_most
