"""Syntax of layer patterns."""

from __future__ import annotations

import pytest

from graphwright.specs.selector import excludes_only, pattern_faults

KINDS = ["linear", "conv2d", "conv_transpose2d", "embedding", "layer_norm"]


@pytest.mark.parametrize(
    "pattern",
    ["*", "encoder.layer.0.*", "*.attention.*", "!*.classifier", "kind:linear", "!kind:conv2d",
     "kind:conv*", "layer.[0-5].mlp", "layer.?", "layer[!3]", "linear", "_orig-mod.x"],
)  # fmt: skip
def test_valid(pattern):
    assert list(pattern_faults([pattern], KINDS)) == []


@pytest.mark.parametrize(
    ("pattern", "fault", "suggestion"),
    [
        ("", "an empty pattern; expected a glob such as '*.attention.*' or 'kind:linear'", ""),
        ("!", "an empty pattern; expected a glob such as '*.attention.*' or 'kind:linear'", ""),
        ("!!head", "'!head' has more than one '!'", "!head"),
        ("kind:liner", "no kind of layer named 'liner'", "kind:linear"),
        ("!kind:Conv2D", "no kind of layer named 'Conv2D'", "!kind:conv2d"),
        ("kind:qqq", "no kind of layer named 'qqq'; there are linear, conv2d, conv_transpose2d, "
         "embedding, layer_norm", ""),
        ("kind:", "no kind after ':'", ""),
        ("kinds:linear", "'kinds:linear': nothing but 'kind' can stand before ':'", "kind:linear"),
        ("re:.*head", "'re:.*head': nothing but 'kind' can stand before ':'", ""),
        ("layer[0", "'layer[0' has brackets that do not pair", ""),
        ("layer]0[", "'layer]0[' has brackets that do not pair", ""),
        ("layer[]", "'layer[]' has empty brackets, which match nothing", ""),
        ("a..b", "'a..b': parts of a layer name are joined by one dot", "a.b"),
        ("a/b", "'a/b': parts of a layer name are joined by one dot", "a.b"),
        ("a, b", "'a, b' holds a space; a layer name has none", "a,b"),
        ("a,b", "'a,b' holds several patterns; each is an entry of its own", ""),
        (" head", "' head' holds a space; a layer name has none", "head"),
        ("^head$", "'^head$': '^' belongs to regular expressions, this is a glob", ""),
        ("{a}", "'{a}': '{' belongs to regular expressions, this is a glob", ""),
    ],
)  # fmt: skip
def test_malformed(pattern, fault, suggestion):
    assert list(pattern_faults([pattern], KINDS)) == [(0, fault, suggestion)]


def test_a_pattern_twice():
    assert list(pattern_faults(["a", "b", "a"], KINDS)) == [
        (2, "'a' stands twice; the first is entry 0", "")
    ]


def test_only_exclusions():
    assert excludes_only(["!a", "!b"])
    assert not excludes_only(["*", "!b"])
    assert not excludes_only([])
