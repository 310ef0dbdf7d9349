"""A lean part of `run.py`: faults are caught, right passes left alone, chains run to their end."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from trust import pairs
from trust.chains import BACKENDS, beyond_the_declared, draw_chains, legal, prepare, run_chain
from trust.faults import KINDS, draw_faults
from trust.judge import STAGES, draw_right, false_alarm, is_caught
from trust.nets import NETS

FAULTS = list(itertools.islice(draw_faults(seed=7), len(KINDS) * len(STAGES)))


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_caught(number: int) -> None:
    fault, stage = FAULTS[number], STAGES[number // len(KINDS)]
    assert is_caught(fault, stage), (stage, fault.kind, fault.net, fault.what)


@pytest.mark.parametrize(("net", "seed", "what"), list(itertools.islice(draw_right(), 0, 63, 8)))
def test_right_passes_are_left_alone(net: str, seed: int, what: str) -> None:
    assert false_alarm(NETS[net].program(seed), what) == ""


CHAINS = [
    ("TwoHeads", "cleanup.fold_constants prune.magnitude"),
    ("Mlp", "cleanup.merge_linear prune.wanda quantize.smoothquant quantize.rtn"),
    ("ResidualConvs", "prune.dsnot cleanup.eliminate_common_subexpressions"),
    ("Language", "cast.dtype quantize.nf4"),
    ("ResidualConvs", "prune.mfac prune.magnitude quantize.int8"),
    ("Language", "prune.sparsegpt quantize.awq"),
    ("Mlp", "prune.udfc prune.dsnot"),
    ("Attention", "quantize.int8 cast.dtype"),
    ("Mlp", "cleanup.fold_constants cleanup.canonicalize quantize.udfc"),
    ("Mobile", "cleanup.fold_batch_norm quantize.rtn compensate.svd"),
    ("Attention", "prune.zig quantize.gptq compensate.eora"),
]
"""Chains as `run.py` draws them, written down, so that a further pass changes none."""


@pytest.mark.parametrize(("net", "chain"), CHAINS)
def test_chains_that_the_check_lets_pass_run_to_their_end(
    net: str, chain: str, tmp_path: Path
) -> None:
    folder = prepare(net, tmp_path)
    names = tuple(chain.split())
    assert legal(names, folder)
    run = run_chain(net, names, folder, BACKENDS)
    assert run.ended == "done", run.said
    assert beyond_the_declared(run, folder) == []


def test_drawn_chains_are_legal_or_not_by_the_check_alone(tmp_path: Path) -> None:
    (tmp_path / "data.npz").touch()
    drawn = list(itertools.islice(draw_chains(seed=5), 60))
    found = [legal(chain, tmp_path) for _, chain in drawn]
    assert True in found
    assert False in found


PAIRS = [
    ("decompose.svd", "quantize.int8", "ok"),
    ("quantize.rtn", "decompose.svd", "rule"),
    ("prune.zig", "decompose.welore", "ok"),
    ("fuse.skip", "quantize.int8", "ok"),
    ("prune.zig", "fuse.skip", "rule"),
    ("reparameterize.repvgg", "prune.zig", "ok"),
    ("reparameterize.subpixel", "quantize.int8", "ok"),
    ("resize.assemble", "quantize.int8", "ok"),
    ("quantize.int8", "resize.module_distill", "rule"),
    ("prune.zig", "resize.assemble", "ok"),
    ("insert.scale_affine", "prune.zig", "ok"),
    ("adapt.lora", "insert.scale_affine", "ok"),
]


@pytest.mark.parametrize(("first", "second", "word"), PAIRS)
def test_structural_passes_go_with_others(
    first: str, second: str, word: str, tmp_path: Path
) -> None:
    """A sample of docs/pairs.md: compiled and equal in both artifacts, or refused by the check."""
    found, said = pairs.judge(first, second, tmp_path)
    assert found == word, said
