"""The shipped schema: current, valid, and saying the same as the option models."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from graphwright.backends.base import all_backends
from graphwright.ir.options import Options
from graphwright.passes.base import Pass
from graphwright.passes.registry import find_pass, pass_ids, register
from graphwright.specs import parse_spec, shipped_schema
from graphwright.specs.check import make_validator
from graphwright.specs.generate import (
    OUTPUT,
    build_schema,
    current_schema,
    define_pass,
    schema_text,
)  # fmt: skip
from graphwright.specs.sections import CalibrationSection, InputSection, RequireSection

CLASSES = {name: find_pass(name) for name in pass_ids()}


def test_it_is_current():
    text = OUTPUT.read_text(encoding="utf-8")
    assert text == schema_text(current_schema()), "run python -m graphwright.specs.generate"


def test_it_is_a_json_schema_that_describes_everything():
    document = shipped_schema().document
    Draft202012Validator.check_schema(document)
    for name in [*pass_ids(), *all_backends()]:
        assert document["$defs"][name]["description"]
        for option, schema in shipped_schema().options(name).items():
            assert schema.get("description"), f"{name}.{option} has no docstring"


def test_editors_take_the_example_that_the_checker_takes():
    document = {
        "version": 1,
        "model": {"inputs": {"x": {"dtype": "int64", "shape": ["n", 4], "range": [0, 9]}}},
        "passes": [
            "cleanup.canonicalize", {"quantize.int8": {"targets": ["*"]}}, {"cast.dtype": None},
        ],
        "lower": ["onnxruntime"],
    }  # fmt: skip
    assert list(Draft202012Validator(shipped_schema().document).iter_errors(document)) == []
    assert parse_spec(json.dumps(document)).passes


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.text(max_size=5)
    | st.floats(-3, 200) | st.sampled_from(["static", "mse", "float16", "*", "batch", "int64"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def accepts(model: type[Options], document: dict) -> bool:
    """Whether every option by itself is right; rules between options are `core/job/rules.py`'s."""
    try:
        model.model_validate_json(json.dumps(document))
    except ValidationError as error:
        return all(item["loc"] == () and item["type"] == "value_error" for item in error.errors())
    return True


@pytest.mark.parametrize("name", sorted(CLASSES))
@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data())
def test_schema_and_option_models_accept_the_same(name, data):
    options = shipped_schema().options(name)
    names = st.sampled_from([*options, "other"])
    document = {
        key: data.draw(st.sampled_from(options.get(key, {}).get("enum", [1])) | values)
        for key in data.draw(st.lists(names, unique=True, max_size=3))
    }
    # Leaving an option out is how a spec says "none": null is for the model alone.
    document = {key: value for key, value in document.items() if value is not None}
    schema = {**shipped_schema().definitions[name], "$defs": shipped_schema().definitions}
    assert make_validator(schema).is_valid(document) == accepts(CLASSES[name].Options, document)


@pytest.mark.parametrize("model", [CalibrationSection, InputSection, RequireSection])
@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data())
def test_schema_and_sections_accept_the_same(model, data):
    schema = shipped_schema().definitions[model.__name__]
    fields = st.sampled_from([*schema["properties"], "other"])
    document = {
        key: data.draw(values.filter(lambda v: v is not None))
        for key in data.draw(st.lists(fields, unique=True, max_size=4))
    }
    validator = make_validator({**schema, "$defs": shipped_schema().definitions})
    assert validator.is_valid(document) == accepts(model, document)


class ScaleOptions(Options):
    """Options of the test pass."""

    factor: int
    """How much."""


class Scale(Pass):
    """Multiplies everything."""

    Options = ScaleOptions
    after = ("cleanup.*",)
    lowers_to = ("triton",)


def test_a_registered_pass_is_checked_like_a_built_in_one(problems):
    register("custom_test.scale")(Scale)
    assert problems("version: 1\npasses: [custom_test.scale: {factor: 2}]\n") == []
    assert problems("version: 1\npasses: [custom_test.scale: {facotr: 2}]\n") == [
        "spec.yaml:2:30: passes[0].facotr: custom_test.scale has no option 'facotr'; did you mean "
        "'factor'?"
    ]
    assert problems("version: 1\npasses: [custom_test.scale]\n") == [
        "spec.yaml:2:10: passes[0]: custom_test.scale needs options: 'factor'"
    ]
    assert problems("version: 1\npasses: [custom_test.scal: {factor: 2}]\n") == [
        "spec.yaml:2:10: passes[0]: no pass named 'custom_test.scal'; did you mean "
        "'custom_test.scale'?"
    ]
    (only,) = problems(
        "version: 1\npasses: [custom_test.scale: {factor: 2}]\nlower: [onnxruntime]\n"
    )
    assert "backend onnxruntime (line 3) cannot lower custom_test.scale" in only


def test_an_entry_point_that_cannot_be_imported_is_a_problem(problems, monkeypatch):
    from graphwright.specs import schema

    def broken(name: str):
        raise ImportError("no module named nothing")

    monkeypatch.setattr(schema, "_entry_point_names", lambda: ("far.away",))
    monkeypatch.setattr("graphwright.passes.registry._from_entry_point", broken)
    first, *_ = problems("version: 1\npasses: [far.away]\n")
    assert first == (
        "spec.yaml:2:10: passes[0]: the package that provides far.away cannot be imported: "
        "ImportError: no module named nothing"
    )


def test_nested_option_models_keep_apart():
    class Inner(Options):
        depth: int = 1

    class Outer(Options):
        inner: Inner = Inner()

    class Nested(Pass):
        """Has a model in a model."""

        Options = Outer

    definitions = define_pass("a.b", Nested)
    assert set(definitions) == {"a.b", "a.b.Inner"}
    document = build_schema({"a.b": Nested}, {}, {}, [])
    validator = make_validator(document)
    good = {"version": 1, "passes": [{"a.b": {"inner": {"depth": 2}}}]}
    bad = {"version": 1, "passes": [{"a.b": {"inner": {"depth": "2"}}}]}
    assert list(validator.iter_errors(good)) == []
    assert len(list(validator.iter_errors(bad))) == 1
