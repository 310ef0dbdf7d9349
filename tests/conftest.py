"""For every test: reproducible property tests, interpreted kernels, and a check in each test."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest

# One thread per test process, before torch or numpy read it: two workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Scripts that tests start as processes import the shared nets too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def _has_cuda_driver() -> bool:
    """True if the CUDA driver loads and reports a device; asked without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


# Triton reads this when a kernel is declared, so it is set before anything imports triton.
if not _has_cuda_driver():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Property tests draw the same examples on every run and are not timed."""
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "graphwright",
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=30,
        suppress_health_check=[HealthCheck.too_slow],  # a first example pays for torch's imports
    )
    settings.load_profile("graphwright")


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """A network made without a seed has the same weights whichever tests ran before it."""
    if "torch" in sys.modules:  # before its import, the generator is at its fixed first seed
        sys.modules["torch"].manual_seed(0)


_CHECKING_CALL = re.compile(r"^_?(assert|check|expect|verify|refuse|raises|warns|fail|opcheck)")


@cache
def _functions(path: Path) -> dict[str, list[ast.AST]]:
    """Every function of a test file by name."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def _checks_something(function: ast.AST) -> bool:
    """True if the function asserts, or calls a check by its name (`assert_close`, `raises`)."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = called.id if isinstance(called, ast.Name) else called
            if isinstance(name, str) and _CHECKING_CALL.match(name):
                return True
    return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that checks nothing cannot fail, so it fails here."""
    if not isinstance(item, pytest.Function):
        return
    functions = _functions(item.path).get(item.originalname, [])
    if functions and not any(_checks_something(function) for function in functions):
        pytest.fail(f"{item.originalname} checks nothing: add an assertion", pytrace=False)
