"""A lean part of `run.py`: faults are caught, right passes left alone, chains run to their end."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from trust.chains import BACKENDS, beyond_the_declared, draw_chains, legal, prepare, run_chain
from trust.faults import KINDS, draw_faults
from trust.judge import STAGES, draw_right, false_alarm, is_caught
from trust.nets import NETS

FAULTS = list(itertools.islice(draw_faults(seed=7), len(KINDS) * len(STAGES)))


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_caught(number: int) -> None:
    fault, stage = FAULTS[number], STAGES[number // len(KINDS)]
    assert is_caught(fault, stage), (stage, fault.kind, fault.net, fault.what)


@pytest.mark.parametrize(("net", "seed", "what"), list(itertools.islice(draw_right(), 0, 63, 3)))
def test_right_passes_are_left_alone(net: str, seed: int, what: str) -> None:
    assert false_alarm(NETS[net].program(seed), what) == ""


def test_chains_that_the_check_lets_pass_run_to_their_end(tmp_path: Path) -> None:
    drawn = (
        (net, chain)
        for net, chain in draw_chains(seed=5, longest=3)
        if legal(chain, prepare(net, tmp_path))
    )
    for net, chain in itertools.islice(drawn, 10):
        folder = prepare(net, tmp_path)
        run = run_chain(net, chain, folder, BACKENDS)
        assert run.ended == "done", (net, chain, run.said)
        assert beyond_the_declared(run, folder) == []
