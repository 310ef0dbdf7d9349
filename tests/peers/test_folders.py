"""Folders that the formats' own libraries write are read as those libraries read them.

For developers: the libraries' pins clash, so each has an environment of its own.
`python tests/peers/run.py` makes them and runs this file in each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peers import cases, refused

LOGITS = {"bitsandbytes": 5e-3, "gptqmodel": 2e-3}
"""Bounds for libraries whose kernels on a CPU round products to half precision."""


def every() -> list[Any]:
    """A library and a case each; a skipped one for a library that is not here."""
    found: list[Any] = []
    for library, distribution in cases.LIBRARIES.items():
        if library == "transformers":
            continue
        if library in cases.installed():
            found += [(library, case) for case in cases.maker(library).CASES]
        else:
            reason = f"{distribution} is not installed: see tests/peers/run.py"
            found.append(pytest.param(library, "", marks=pytest.mark.skip(reason=reason)))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "case"), every())
def test_weights_are_those_that_the_library_makes(library: str, case: str, tmp_path: Path) -> None:
    try:
        found = cases.compare(library, case, tmp_path / "m")
    except ValueError as error:
        # Versions before 0.18 pack zero points of odd bits for a full last word only, versions
        # before 0.12 know no tiles.
        if library == "compressed_tensors" and ("broadcast" in str(error) or "valid" in str(error)):
            pytest.skip(f"this version cannot write it: {str(error).splitlines()[0]}")
        raise
    assert found.weights < 1e-3
    if found.logits is not None:
        assert found.logits < LOGITS.get(library, 1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["float8 in tiles of 32", "float8 in tiles of 128"])
def test_float8_in_tiles_as_transformers_reads_it(case: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert cases.compare("transformers", case, tmp_path / "m").weights < 1e-3


@pytest.mark.parametrize("name", list(refused.REFUSED))
def test_what_is_not_read_is_said_in_one_line(name: str) -> None:
    words = refused.words(name)
    assert "not read" in words
    assert "\n" not in words
