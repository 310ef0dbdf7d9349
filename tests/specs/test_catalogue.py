"""What `graphwright passes` and `graphwright schema` print."""

from __future__ import annotations

import json

import pytest

from graphwright.ir.errors import ArgumentError
from graphwright.passes.registry import pass_ids
from graphwright.specs import shipped_schema
from graphwright.specs.catalogue import explain_pass, list_passes, schema_json


def test_every_pass_has_one_line():
    head, *rows = list_passes().splitlines()
    assert head.split()[:3] == ["pass", "contract", "needs"]
    assert set(pass_ids()) <= {row.split()[0] for row in rows}


def test_a_pass_is_explained_with_all_its_options():
    text = explain_pass("quantize.int8")
    for option in shipped_schema().options("quantize.int8"):
        assert f"\n  {option}: " in text
    assert "calibration with activations: static" in text
    assert "  percentile: number, > 50, <= 100; default 99.99\n" in text
    assert "  activations: one of dynamic, static; default dynamic\n" in text


def test_an_unknown_pass():
    with pytest.raises(ArgumentError, match=r"Did you mean 'quantize\.int8'"):
        explain_pass("quantize.in8")


def test_the_schema_is_printed_as_shipped():
    assert json.loads(schema_json()) == shipped_schema().document
