"""Fill the README's table from a finished demo.

    python docs/demo/results.py OUT

OUT is the folder that `make demo` wrote. The figures are read from its `report.json` and
`comparison.json` and put between the markers in README.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def table(report: dict[str, Any], comparison: list[dict[str, Any]]) -> str:
    """The Markdown table and the line that says where its figures come from."""
    latency = next(row for row in report["latency"] if row["backend"] == "onnxruntime")
    artifact = next(a for a in report["result"]["artifacts"] if a["backend"] == "onnxruntime")
    batch = comparison[-1]
    texts, tokens = latency["shapes"][0]
    before, after = report["model"]["weight_bytes"] / 1e6, artifact["file_bytes"] / 1e6
    job = f"{texts} texts of {tokens} tokens, {latency['threads']} threads"
    versions = f"torch {report['versions']['torch']}, {cpu()}"
    return f"""\
| | original (PyTorch, fp32) | compiled (ONNX Runtime, int8) |
| --- | --- | --- |
| size | {before:.1f} MB of weights | {after:.1f} MB file |
| latency, {job} | {latency["before_ms"]:.1f} ms \
| {latency["after_ms"]:.1f} ms ({latency["speedup"]:.2f}x) |
| cosine of embeddings, {batch["texts"]} texts | 1 \
| {batch["mean_cosine"]:.4f} mean, {batch["lowest_cosine"]:.4f} lowest |
| nearest other text is the same | | {batch["same_nearest"]:.0%} |

Made by `make demo` and `python docs/demo/results.py out/demo` ({versions}).
"""


def cpu() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M)
        name = found[1] if found else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def main(out: Path) -> None:
    """Rewrite the README."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    comparison = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    filled = table(report, comparison)
    text, count = BLOCK.subn(rf"\1{filled}\2", README.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{README} has no results markers")
    README.write_text(text, encoding="utf-8")
    print(filled)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
