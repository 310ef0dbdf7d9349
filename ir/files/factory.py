"""The user's own function that builds the module a file of weights belongs to."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.user_code import admit


def build_module(factory: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Calls `package.module:function(**kwargs)` and returns its model in eval mode.

    The module is found on the import path and in the current folder. Naming it in a spec is the
    permission to run it.

    Raises:
        ModelError: no such module or function, arguments that do not fit, an exception inside, or
            a result that is no `nn.Module`.
        ArgumentError: code is not to run.
    """
    admit(factory, "the model's factory")
    function = _find(factory)
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise ModelError(
            f"the factory does not take these arguments: {error}",
            where=factory,
            fix="Correct `kwargs` in the spec's model section.",
            details=(f"it takes {_signature(function)}",),
        ) from error
    except ValueError:
        pass  # a builtin without a signature: the call itself will tell
    try:
        module = function(**kwargs)
    except Exception as error:  # the user's own code
        raise ModelError(
            f"the factory failed with {type(error).__name__}: {error}",
            where=_place(factory, error),
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"the factory returned a {type(module).__name__}, not an nn.Module", where=factory
        )
    return module.eval()


def _find(factory: str) -> Callable[..., Any]:
    name, _, attribute = factory.partition(":")
    if not name or not attribute:
        raise ModelError("a factory is written `package.module:function`", where=factory)
    with current_folder():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            inner = error.name is not None and not f"{name}.".startswith(f"{error.name}.")
            what = f"it imports {error.name!r}, which is not installed" if inner else (
                f"no module {error.name!r} on the import path or in {Path.cwd()}"
            )  # fmt: skip
            raise ModelError(f"the factory cannot be imported: {what}", where=factory) from error
        except Exception as error:  # the user's own code
            raise ModelError(
                f"the factory's module failed with {type(error).__name__}: {error}",
                where=_place(factory, error),
            ) from error
    function = getattr(module, attribute, None)
    if function is None:
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ModelError(
            f"module {name!r} has no {attribute!r}",
            where=factory,
            fix=f"It has: {', '.join(sorted(names)[:8]) or 'nothing callable'}.",
        )
    if not callable(function):
        raise ModelError(f"{attribute!r} is a {type(function).__name__}, not a function",
                         where=factory)  # fmt: skip
    return function  # type: ignore[no-any-return]


@contextmanager
def current_folder() -> Iterator[None]:
    """Scripts find modules beside them; a console command does not, unless asked to."""
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _signature(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except ValueError:
        return "unknown arguments"


def _place(factory: str, error: BaseException) -> str:
    """The line of the user's code that raised, as `file:line`."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and "importlib" not in f.filename]
    here = str(Path(__file__))
    own = [frame for frame in own if frame.filename != here]
    return f"{factory} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else factory
