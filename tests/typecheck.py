"""Run `mypy --strict` on the package, which an editable install hides from mypy.

The folders of the checkout are parts of one import package, so mypy gets a tree of links that looks
like the installed package. Its messages are printed with the paths of the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typecheck"


def link_package() -> None:
    """Build `build/typecheck/graphwright`, a folder of links into the checkout."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "graphwright"
    package.mkdir(parents=True)
    parts = [ROOT / folder for folder in ("ir", "passes", "backends", "specs")]
    for source in [*parts, *(ROOT / "core").iterdir()]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)


def main() -> int:
    """Exit status of mypy."""
    link_package()
    command = [sys.executable, "-m", "mypy", "--strict", "-p", "graphwright", *sys.argv[1:]]
    environment = {**os.environ, "MYPYPATH": str(TREE)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    output = result.stdout + result.stderr
    for folder in ("ir", "passes", "backends", "specs"):
        output = output.replace(f"build/typecheck/graphwright/{folder}/", f"{folder}/")
    sys.stdout.write(output.replace("build/typecheck/graphwright/", "core/"))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
