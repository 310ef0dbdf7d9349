"""Configurations of diffusers that an option names: a file, or that of the network's pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.sampling.diffusers import PIPELINE

OWN = "pipeline"
"""What an option says for the configuration of the folder that the network came from."""


def configuration(kind: str, named: str, folder: Path, program: Program) -> dict[str, Any]:
    """What a `scheduler_config.json` or a `guider_config.json` says.

    Args:
        kind: `scheduler` or `guider`.
        named: a path, or `pipeline`.
        folder: that paths start from.
        program: the network.

    Raises:
        ArgumentError: there is no such file, it is no configuration, or the network came with none.
    """
    if named == OWN:
        found = program.facts.get(PIPELINE, {}).get(kind)
        if found is None:
            raise ArgumentError(
                f"`{kind}: {OWN}` is for the folder of a pipeline with a {kind}, and the network "
                "came with none",
                fix=f"Give the path of a {kind}_config.json.",
            )
        return dict(found)
    path = folder / named
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"no {kind}'s configuration can be read: {error}",
                            where=str(path)) from None  # fmt: skip
    if not isinstance(config, dict):
        raise ArgumentError(f"no {kind}'s configuration can be read: it is no mapping",
                            where=str(path))  # fmt: skip
    return config
