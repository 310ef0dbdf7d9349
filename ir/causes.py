"""The innermost cause of an engine's error, in one line."""

from __future__ import annotations

import re

_LONGEST = 300
_FRAME = re.compile(r"^\s*(File \"|Traceback|[~^]+\s*(<---.*)?$|\.{3}$)|<--- HERE")
_WRAPPER = re.compile(
    r"The following operation failed in the TorchScript interpreter"
    r"|^(From user code|Set TORCH|You can suppress)"
)
_RAISED = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception)): (.+)$")
_QUOTED = re.compile(r"got \w+(?:Error|Exception)\((['\"])(.+?)\1\)")


def innermost(error: BaseException) -> str:
    """The innermost cause of an error that quotes another one or says nothing itself.

    TorchScript puts the message of the operator below a listing of its own code; other engines
    chain exceptions. The type is named where the text is empty.
    """
    errors = chain(error)
    for one in errors:
        text = _telling(str(one))
        if text:
            return text[:_LONGEST]
    return type(errors[-1]).__name__


def chain(error: BaseException) -> list[BaseException]:
    """An error, the one that it was raised from, and so on."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _telling(text: str) -> str:
    """The line of a message that tells the cause; empty when there is none."""
    quoted = _QUOTED.search(text)
    if quoted:
        return quoted.group(2)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [match for match in map(_RAISED.match, lines) if match]
    quotes_code = any(_WRAPPER.search(line) or _FRAME.search(line) for line in lines)
    if raised and quotes_code:
        return raised[-1].group(2)
    return next((line for line in lines if not _WRAPPER.search(line)), "")
