"""Errors of torch.export in the user's terms: the line of their code, the reason, the way out."""

from __future__ import annotations

import os
import re
import traceback

import torch

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_LIBRARY = os.path.dirname(os.path.abspath(traceback.__file__)) + os.sep + "contextlib"
_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_WITHIN = tuple(
    _OWN + f for f in ("free_sizes.py", "inactive_dropout.py", "known_values.py", "prepare.py")
)
"""Ours, and called by the model's code as it runs."""

REMEDIES = (
    (
        r"PackedSequenceError",
        "packed sequences cannot be traced, for their sizes are values of a tensor",
        "Run the layer on the padded batch and mask what lies behind the lengths; for a last state "
        "gather the output at lengths - 1. A backward direction needs each sequence turned round "
        "within its length (gather) before and after.",
    ),
    (
        r"data-dependent|DataDependent|Eq\(u\d+|\bu\d+\b",
        "a branch or a size depends on the values of a tensor, which a graph cannot hold",
        "Use torch.where or masking instead of `if`, `.item()`, `.tolist()` or a loop over values.",
    ),
    (
        r"numpy|\.numpy\(\)|__array__",
        "a tensor is turned into a NumPy array, where tracing cannot follow",
        "Use the torch function of the same name.",
    ),
    (
        r"mutat\w+ .*(input|attribute)|assigned during export|attributes .* were assigned",
        "the forward method changes the module's own attributes",
        "Return the value instead, or register it as a buffer.",
    ),
    (
        r"deepcopy|pickle|generator|torch\.jit|ScriptModule",
        "the forward method goes through code that torch.export cannot see into",
        "Call the plain Python form of the function.",
    ),
    (
        r"'NoneType' object",
        "an argument that was left out is missing on the way the model takes when it is exported",
        "Give the optional inputs, as attention_mask, among the example inputs.",
    ),
    (
        r"specializ|Constraints violated|could not prove|0/1",
        "the model fixes a dimension that was asked to be free",
        "Leave that dimension out of `dynamic`, or change the line that fixes it.",
    ),
)


def is_users(file: str) -> bool:
    """Whether a file is the model's: not torch's, nor ours, nor generated."""
    return not file.startswith("<") and not os.path.abspath(file).startswith(
        (_TORCH, _LIBRARY, _OWN)
    )


def is_own(file: str) -> bool:
    """Whether a file is of this package's tracing, and is not called by the model's code."""
    path = os.path.abspath(file)
    return path.startswith(_OWN) and path not in _WITHIN


def user_line(error: BaseException) -> tuple[str, str]:
    """("path:line", source text) of the innermost frame that is the user's; empty when none is.

    Frames of torch, of this package, and of generated code are left out. What remains innermost
    is the model's own code, or that of the library the model comes from.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    ours = [i for i, frame in enumerate(frames) if is_own(frame.filename)]
    # What called `trace` lies outside our own innermost frame; the model's code lies inside.
    inner = frames[ours[-1] + 1 :] if ours else frames
    model = [frame for frame in inner if is_users(frame.filename)]
    if not model:
        return "", ""
    return f"{model[-1].filename}:{model[-1].lineno}", (model[-1].line or "").strip()


def explain(error: BaseException, what: str = "") -> ModelError:
    """The refusal for a failed trace: the user's line, the reason, the remedy.

    Args:
        error: what was raised inside the trace; one of ours is handed back as it is.
        what: what failed, where it is not the tracing.
    """
    if isinstance(error, ModelError):
        return error
    place, code = user_line(error)
    message = str(error).strip() or type(error).__name__
    first = re.split(r"(?<=\.)\s", innermost(error))[0]
    # A listing of TorchScript's code says nothing about what failed in it.
    searched = first if "TorchScript interpreter" in message else message
    details = [f"> {code}"] if code else []
    if what:
        return ModelError(f"{what}: {first}", where=place, details=tuple(details))
    reason, fix = "", "Change that line to plain tensor operations."
    for pattern, meaning, remedy in REMEDIES:
        if re.search(pattern, f"{type(error).__name__} {searched}"):
            reason, fix = meaning, remedy
            details.append(f"torch says: {first}")
            break
    text = f"the model cannot be traced: {reason or first}"
    return ModelError(text, where=place, fix=fix, details=tuple(details))
