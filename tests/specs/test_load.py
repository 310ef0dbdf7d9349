"""Reading YAML: 1.2 scalars, places, bounds, and one clear error for what is no spec at all."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import SpecError
from graphwright.specs import load, load_spec, parse_spec
from graphwright.specs.emit import to_yaml
from graphwright.specs.load import read_file, read_text, resolve_scalar


def read(text: str):
    node, problems = read_text(text, "spec.yaml")
    assert problems == []
    return node.plain()


def faults(text: str) -> list[str]:
    try:
        _, problems = read_text(text, "spec.yaml")
    except SpecError as error:
        problems = error.problems
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-3.", -3.0), ("+7", 7), ("010", 10),
        ("0o10", 8), ("0x1F", 31), ("1_000", "1_000"), ("1:30", "1:30"), ("0b11", "0b11"),
        ("true", True), ("TRUE", True), ("False", False), ("yes", "yes"), ("off", "off"),
        ("n", "n"), ("null", None), ("~", None), ("NULL", None), ("", None), ("nil", "nil"),
        (".inf", math.inf), ("-.INF", -math.inf), ("inf", "inf"), ("2024-01-01", "2024-01-01"),
        ("1e", "1e"), ("e5", "e5"), ("0x", "0x"), ("--1", "--1"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text, value):
    found = resolve_scalar(text)
    assert (found, type(found)) == (value, type(value))


def test_quoted_scalars_are_text():
    assert read("a: '1'\nb: \"true\"\nc: ''\nd: |\n  5\n") == {
        "a": "1",
        "b": "true",
        "c": "",
        "d": "5\n",
    }


def test_keys_are_text_whatever_they_look_like():
    assert read("1: a\nyes: b\nnull: c\n") == {"1": "a", "yes": "b", "null": "c"}


def test_every_value_and_key_knows_its_place():
    node, _ = read_text("a: 1\nb:\n  - x\n  - {cé: [4, 5]}\n", "spec.yaml")
    inner, _ = node.locate(("b", 1, "cé", 1))
    assert (inner.line, inner.column, inner.value) == (4, 14, 5)
    _, holder = node.locate(("b", 1, "cé"))
    assert holder is not None
    assert (holder.line, holder.column) == (4, 6)


def test_anchors_are_read():
    assert read("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n",
         "spec.yaml:3:1: a: the key 'a' stands twice; the first is in line 1"),
        ("p:\n  - {x: 1, x: 2}\n",
         "spec.yaml:2:12: p[0].x: the key 'x' stands twice; the first is in line 2"),
        ("a: !!int 3\n",
         "spec.yaml:1:4: a: '!!int' is read as a YAML tag, which a spec does not have; put quotes "
         "around a text that starts with !"),
        ("t: ['*', !*.head]\n",
         "spec.yaml:1:10: a text that starts with ! must stand in quotes"),
        ("t:\n- !*.head\n",
         "spec.yaml:2:3: t[0]: '!*.head' is read as a YAML tag, which a spec does not have; put "
         "quotes around a text that starts with !"),
        ("t: *attention\n",
         "spec.yaml:1:4: t: '*attention' is read as a YAML alias, and nothing has that anchor; put "
         "quotes around a text that starts with *"),
        ("t: [*.attention]\n", "spec.yaml:1:5: a text that starts with * must stand in quotes"),
        ("<<: {a: 1}\n",
         "spec.yaml:1:1: ['<<']: merge keys (<<) do not exist in YAML 1.2; write the keys out"),
        ("? [a]\n: 1\n", "spec.yaml:1:3: a key must be a name, not a list, mapping or alias"),
        ("a: 1\n---\nb: 2\n", "spec.yaml:2:1: a second document starts here; a spec is one "
         "document"),
        ("a:\n\tb: 1\n", "spec.yaml:2:1: a tab; indent with spaces"),
        ("a: 1\n b: 2\n",
         "spec.yaml:2:3: a ':' where none can stand; check the indentation, or quote the text"),
        ("a: @b\n", "spec.yaml:1:4: a text that starts with @ must stand in quotes"),
        ("a: 'b\n",
         "spec.yaml:1:6: not YAML: found unexpected end of stream (while scanning a quoted "
         "scalar)"),
        ("a: 1e999\n", "spec.yaml:1:4: a: '1e999' is a number too large for a float"),
        (f"a: {'9' * 41}\n",
         "spec.yaml:1:4: a: '99999999999999999999999999... is a number of more than 40 digits"),
        ("a: \x07\n", "spec.yaml:1:4: not a text file (control character '\\x07')"),
        ("", "spec.yaml:1:1: is empty; a spec starts with `version: 1`"),
        ("# nothing\n", "spec.yaml:1:1: is empty; a spec starts with `version: 1`"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_yaml_is_said_in_one_line(text, message):
    assert faults(text) == [message]


def test_duplicates_and_tags_come_together_with_what_the_schema_finds():
    with pytest.raises(SpecError) as caught:
        parse_spec("version: 1\nseed: 1\nseed: 2\npases: [!x cleanup.canonicalize]\n")
    assert [(p.line, p.column) for p in caught.value.problems] == [(3, 1), (4, 1), (4, 9)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\x00", "{file}:1:1: not UTF-8 text (byte 0xff)"),
        (b"a: 1\nb: caf\xe9\n", "{file}:2:7: not UTF-8 text (byte 0xe9)"),
        (b"PK\x03\x04\x00", "{file}:1:3: not a text file (control character '\\x03')"),
        (b"", "{file}:1:1: is empty; a spec starts with `version: 1`"),
        (b"#" * 300_000, "{file}:1:1: larger than 256 KiB; data belongs in files of its own"),
        (b"#" * 262_143 + "é".encode(),
         "{file}:1:1: larger than 256 KiB; data belongs in files of its own"),
    ],
)  # fmt: skip
def test_files_that_are_no_text(tmp_path, content, message):
    file = tmp_path / "spec.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        read_file(file)
    assert str(caught.value) == message.format(file=file)


def test_a_byte_order_mark_is_fine(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert read_file(file)[0].plain() == {"version": 1}


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(SpecError, match="is a folder; expected a YAML file"):
        read_file(tmp_path)
    with pytest.raises(SpecError, match="no such file"):
        read_file(tmp_path / "none.yaml")


HUGE = {
    "deep list": "[" * 200_000,
    "deep mapping": "{" * 200_000,
    "deep dashes": "- " * 100_000,
    "deep keys": "? " * 100_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "many values": "a: [" + "1," * 100_000 + "]",
    "alias bomb": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in pairwise("abcdefg")),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_bombs_are_refused_before_they_cost_anything(name):
    start = time.process_time()
    (message,) = faults(HUGE[name])
    assert "nested deeper than 32" in message or "more than 4000 values" in message
    assert time.process_time() - start < 3  # quadratic scanning took minutes


def test_the_pure_python_parser_reads_the_same(monkeypatch):
    text = to_yaml({"a": [1, "x", None, {"b": [True, 1e-5]}], "c": {"d": "é: x"}})
    fast = read(text)
    monkeypatch.setattr(load, "_LOADER", yaml.SafeLoader)
    assert read(text) == fast
    assert faults("a: 1\na: 2\n") == [
        "spec.yaml:2:1: a: the key 'a' stands twice; the first is in line 1"
    ]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.dictionaries(st.text(), plain, min_size=1, max_size=5))
def test_what_is_written_reads_back_the_same(document):
    found = read(to_yaml(document))
    assert found == document
    assert repr(found) == repr(document)  # because 1 == True == 1.0


PIECES = st.sampled_from(
    ["version: 1\n", "passes:\n", "  - ", "quantize.int8", ": ", "{", "}", "[", "]", "targets",
     "*", "!", "&a ", "*a", "\n", "  ", "\t", "'", '"', "|\n", "seed", "1e-4", "0x", "null",
     "lower", "model", "inputs", "shape", "range", "- ", "? ", "<<", "#", "---\n", "...\n",
     "%YAML 1.2\n", "require", "max_drop", ".nan", ".inf", "-1", "9" * 50,
     "é", "\u2028", "\x00", "\ud800", ","]
)  # fmt: skip


def outcome(text: str) -> tuple:
    """The problems of a text, or what the accepted spec does; empty is neither."""
    try:
        spec = parse_spec(text, check_files=False)
    except SpecError as error:
        return tuple(error.problems)
    return spec.passes + spec.lower


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60))
def test_no_text_makes_anything_but_a_spec_error(text):
    found = outcome(text)
    assert found
    assert all("\n" not in str(problem) for problem in found)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_no_bytes_make_anything_but_a_spec_error(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(data)
    with pytest.raises(SpecError):  # 80 random bytes are no valid spec
        load_spec(file)


section = st.sampled_from(
    ["version", "model", "calibration", "training", "evaluate", "require", "seed", "passes",
     "lower", "lock", "inputs", "shape", "example", "range", "dtype", "kwargs", "quantize.int8",
     "cast.dtype", "targets", "keep", "activations", "onnxruntime", "triton", "data", "metric",
     "folder", "pases"]
)  # fmt: skip
shaped = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | section | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(section, inner, max_size=4),
    max_leaves=15,
)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.dictionaries(section, shaped, max_size=6))
def test_no_document_makes_anything_but_a_spec_error(document):
    text = to_yaml({"version": 1, **document})
    assert outcome(text)
