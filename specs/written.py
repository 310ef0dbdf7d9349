"""All specs that a spec stands for: itself, its parts, and every alternative of a search."""

from __future__ import annotations

from dataclasses import replace

from graphwright.specs.alternatives import alternatives
from graphwright.specs.space import Space
from graphwright.specs.spec import Spec, candidate_spec


def written_specs(spec: Spec) -> list[Spec]:
    """The spec itself and those of its parts; where it has a search, those of every alternative."""
    found = [replace(spec, search=None)]
    if spec.search is not None:
        space = Space.of(spec.document)
        found += [candidate_spec(spec, space, picks) for picks in alternatives(space)]
    return [each for one in found for each in (one, *one.parts.values())]
