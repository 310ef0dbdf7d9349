"""The wheel holds the whole package and nothing else, and works outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import graphwright as gw

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
UNSHIPPED = ("*.egg-info", "__pycache__", "*.pyc")


def test_every_package_folder_is_listed() -> None:
    """An unlisted subfolder works in an editable install and is missing from the wheel."""
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_every_folder_with_code_is_a_package() -> None:
    folders = {
        source.parent for folder in FOLDERS.values() for source in (ROOT / folder).rglob("*.py")
    }
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


def test_console_scripts() -> None:
    assert set(PROJECT["project"]["scripts"]) == {"optimize", "graphwright"}


def test_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_constraints_pin_every_development_tool() -> None:
    """CI installs the same versions every day: all that pyproject asks for is pinned."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_plain(line.split("==")[0]) for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    asked = {
        _plain(name)
        for name in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["hub"]]
    }
    elsewhere = {"onnxruntime"}  # the other platforms' build of onnxruntime-gpu
    assert asked - pinned - elsewhere == set()


def test_every_place_names_the_same_versions_of_python() -> None:
    asked = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"])
    assert asked is not None
    lowest, above = int(asked[1]), int(asked[2])
    language = "Programming Language :: Python :: 3."
    classified = [
        int(line.removeprefix(language))
        for line in PROJECT["project"]["classifiers"]
        if line.startswith(language)
    ]
    assert classified == list(range(lowest, above))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {lowest}) <= sys.version_info < (3, {above})" in makefile
    tried = re.search(r"^PYTHON \?= .*python3 ((?:python3\.\d+ ?)+)", makefile, re.MULTILINE)
    assert tried is not None
    assert tried[1].split() == [f"python3.{minor}" for minor in reversed(classified)]
    words = f"Python 3.{lowest} to 3.{above - 1}"
    for page in ("README.md", "Makefile", "constraints.txt", ".ci/run"):
        assert words in (ROOT / page).read_text(encoding="utf-8"), page


def test_pinned_torch_is_a_supported_one() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))
    torch = next(d for d in PROJECT["project"]["dependencies"] if d.startswith("torch"))
    assert Requirement(torch).specifier.contains(pinned)


def _plain(requirement: str) -> str:
    """The normalized name a requirement begins with."""
    for mark in ("[", ";", ">", "<", "=", "!", "~", " "):
        requirement = requirement.split(mark)[0]
    return requirement.strip().lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so the checkout gets no build folder."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*UNSHIPPED))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(target), str(copy)],
        check=True,
        capture_output=True,
    )
    return next(target.glob("graphwright-*.whl"))


def test_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            skipped = path.is_dir() or path.suffix == ".pyc" or path.name.startswith(".")
            if not skipped:
                expected.add(
                    "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
                )
    assert shipped == expected


def test_wheel_carries_licence_and_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    assert "optimize = graphwright.cli:optimize_main" in archive.read(scripts).decode()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked into an empty folder; its dependencies come from this environment."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", str(site), str(wheel)], check=True, capture_output=True)
    return site


def _run(site: Path, *command: str) -> str:
    """Output of a command that sees the installed wheel before the editable checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        command, cwd=site.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_wheel_is_the_package_that_is_imported(installed: Path) -> None:
    code = (
        "import graphwright, graphwright.specs as s; print(graphwright.__file__); print(s.__file__)"
    )
    paths = _run(installed, sys.executable, "-c", code).split()
    assert all(Path(path).is_relative_to(installed) for path in paths)


def test_every_module_of_the_wheel_imports(installed: Path) -> None:
    """But for the one that is a part of another package's program, which has to be there."""
    code = (
        "import importlib, pkgutil, graphwright\n"
        "names = [m.name for m in pkgutil.walk_packages(graphwright.__path__, 'graphwright.')]\n"
        "[importlib.import_module(name) for name in names if not name.endswith(ELSEWHERE)]\n"
        "print(len(names))"
    ).replace("ELSEWHERE", "('__main__', '.lm_eval')")
    assert (
        int(_run(installed, sys.executable, "-W", "ignore", "-c", code))
        >= len(SETUPTOOLS["packages"]) - 1
    )


def test_bare_folder_names_are_not_importable(installed: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "names = ('core', 'ir', 'passes', 'backends', 'specs', 'tests', 'docs')\n"
        "print([name for name in names if find_spec(name)])"
    )
    assert _run(installed, sys.executable, "-c", code).strip() == "[]"


def test_command_answers_from_the_wheel(installed: Path) -> None:
    help_text = _run(installed, sys.executable, str(installed / "bin" / "optimize"), "--help")
    assert "--spec" in help_text


def test_version_is_the_distribution_version() -> None:
    import graphwright

    assert graphwright.__version__ == PROJECT["project"]["version"]


def test_no_module_takes_a_public_name() -> None:
    """Importing a submodule binds it on the package, in the place of a function of that name."""
    packages = {"backends", "ir", "passes", "specs"}
    modules = {file.stem for file in (ROOT / FOLDERS["graphwright"]).glob("*.py")}
    assert "api" in modules
    assert not modules & (set(gw.__all__) - packages)
