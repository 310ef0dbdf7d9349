"""Which name a misspelt one is taken for."""

from __future__ import annotations

import random

import pytest

from graphwright.specs import shipped_schema
from graphwright.specs.nearest import distance, nearest

PASSES = shipped_schema().names("pass")
BOUNDS = ["max_drop", "min_speedup", "max_file_mb", "max_rss_gb", "max_minutes", "integer_kernels"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("int8", "quantize.int8"), ("quantization.int8", "quantize.int8"),
        ("Quantize.Int8", "quantize.int8"), ("quantizeint8", "quantize.int8"),
        ("cleanup.FoldBatchNorm", "cleanup.fold_batch_norm"),
        ("fuse.fold_batch_norm", "cleanup.fold_batch_norm"),
        ("fold_batchnorm", "cleanup.fold_batch_norm"), ("cast.dtyp", "cast.dtype"),
        ("cleanup.canonicalise", "cleanup.canonicalize"), ("zzz", ""), ("", ""),
    ],
)  # fmt: skip
def test_passes(written, meant):
    assert nearest(written, PASSES) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("max-drop", "max_drop"), ("maxdrop", "max_drop"), ("max_file_gb", "max_file_mb"),
        ("max_rss_mb", "max_rss_gb"), ("max_seconds", "max_minutes"), ("speedup", "min_speedup"),
        ("min_speed", "min_speedup"), ("drop", "max_drop"), ("colour", ""),
    ],
)  # fmt: skip
def test_bounds(written, meant):
    assert nearest(written, BOUNDS) == meant


def test_a_name_already_used_beside_it_is_less_likely():
    assert nearest("tast", ["test", "fast"]) == "test"
    assert nearest("tast", ["test", "fast"], unlikely=["test"]) == "fast"
    assert nearest("tset", ["test"], unlikely=["test"]) == "test"


def plain_distance(a: str, b: str) -> int:
    """Optimal string alignment, the slow and obvious way."""
    table = [[max(i, j) if not min(i, j) else 0 for j in range(len(b) + 1)]
             for i in range(len(a) + 1)]  # fmt: skip
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


def test_distance_agrees_with_the_plain_algorithm_where_it_matters():
    rng = random.Random(0)
    for _ in range(300):
        name = "".join(rng.choice("abcd") for _ in range(rng.randint(6, 10)))
        word = list(name)
        for _ in range(rng.randint(0, 2)):
            i = rng.randrange(len(word))
            word[i : i + 1] = rng.choice([[], ["e"], [word[i], "f"], [word[i], word[i]]])
        written = "".join(word)
        # Doubled letters count 0.9, swaps 0.95, another first letter 0.05 more.
        assert distance(written, name) == pytest.approx(plain_distance(written, name), abs=0.3)
