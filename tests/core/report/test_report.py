"""The report's content, its page, and what the page does in a real browser."""

import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from models import report_sample as sample
from pydantic import ValidationError
from rich.console import Console

from graphwright.report.build import print_summary, write_report
from graphwright.report.model import Report
from graphwright.report.page import as_text, note_block, render_page


@pytest.fixture(scope="module")
def pair():
    return sample.programs()


@pytest.fixture(scope="module")
def report(pair):
    return sample.sample_report(*pair)


def test_stable_keys(report):
    assert {"version", "model", "passes", "result", "fidelity", "evaluation", "latency"} <= set(
        report
    )
    assert {"source", "sha256", "parameters", "weight_bytes", "macs"} <= set(report["model"])
    keys = {"id", "options", "contract", "seconds", "peak_rss_bytes", "error"}
    assert keys <= set(report["passes"][0])
    figures = {"max_abs", "relative", "cosine", "snr_db"}
    assert set(report["passes"][0]["error"]) == set(report["fidelity"]) == figures
    assert {"parameters", "weight_bytes", "macs", "artifacts"} <= set(report["result"])
    assert {"backend", "path", "file_bytes"} < set(report["result"]["artifacts"][0])
    assert {"metric", "before", "after"} <= set(report["evaluation"])
    keys = {"backend", "device", "threads", "before_ms", "after_ms", "speedup"}
    assert keys <= set(report["latency"][0])


def test_counts_are_those_of_the_model(report):
    assert report["model"]["parameters"] == 5 * 72 + 27
    assert report["model"]["weight_bytes"] == 4 * (5 * 72 + 27)
    assert report["model"]["macs"] == 2 * (5 * 64 + 24)
    assert report["model"]["macs_formula"] == "344*batch"


def test_layers_carry_the_error_of_their_outputs(report):
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["stem"]["relative"] == 0.0  # nothing before the first rounded layer differs
    assert 0 < rows["blocks.0"]["relative"] < 0.1
    assert rows["head"]["relative"] > 0
    assert rows["blocks.3"]["weight_bytes_after"] == 288


def test_what_json_cannot_hold_becomes_null(report):
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["passes"][0]["metrics"]["mean"] is None


def test_a_report_without_a_stable_key_is_refused(report):
    with pytest.raises(ValidationError, match="sha256"):
        Report.model_validate({**report, "model": {"source": "x"}})


def test_files_are_written_and_nothing_else(pair, report, tmp_path):
    write_report(report, pair[1], tmp_path)
    write_report(report, pair[1], tmp_path)  # again, over the first
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_a_failed_write_leaves_the_old_report(pair, report, tmp_path, monkeypatch):
    write_report(report, pair[1], tmp_path)
    before = (tmp_path / "report.json").read_text()

    def no_rename(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        write_report({**report, "seconds": 99.0}, pair[1], tmp_path)
    assert (tmp_path / "report.json").read_text() == before


class _Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def test_page_is_self_contained_and_escaped(pair, report):
    page = render_page(report, pair[1])
    assert sample.HOSTILE not in page
    assert "&lt;script&gt;" in page
    found = _Tags()
    found.feed(page)
    assert not found.tags & {"script", "img", "iframe", "object", "embed"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    addresses = [value for name, value in found.attributes if name in ("src", "href")]
    assert addresses == ["data:,"]
    assert "url(http" not in page
    assert "@import" not in page


def test_page_shows_what_happened(pair, report):
    page = re.sub(r"\s+", " ", render_page(report, pair[1]))
    for text in ("quantize.round", "lossy", "1 changed, 1 left alone", "4.00×", "2.00 ms",
                 "min_speedup missed", "not measured", "MatMul", "blocks.0–3", "±"):  # fmt: skip
        assert text in page, text


def test_page_of_a_run_with_nothing_optional(pair):
    report = sample.sample_report(
        *pair, passes=[], latency=[], evaluation=None, notes={}, require=[], warnings=[],
        artifacts=[],
    )  # fmt: skip
    page = render_page(report)
    assert "No passes" in page
    assert "Latency" not in page


def test_long_tables_are_cut_and_say_so(pair, report):
    many = [[f"layer{i}", "int8", "", True] for i in range(100_000)]
    passes = [{**report["passes"][0], "actions": many}]
    page = render_page({**report, "passes": passes, "layers": report["layers"] * 2000}, pair[1])
    assert len(page.encode()) < 2_000_000
    assert "99760 more are in report.json" in page


def test_notes_of_any_shape_are_shown():
    block = note_block("b", {"counts": {"x": 3, "y": 6}, "list": [1], "flag": True, "no": {}})
    assert block["counts"] == [("counts", [("y", 6, 100.0), ("x", 3, 50.0)])]
    assert block["lists"] == [("list", [1])]
    assert block["pairs"] == [("flag", True), ("no", {})]
    assert as_text({"sizes": {"batch": 8}, "relative": 4e-7}) == "sizes batch 8, relative 4e-07"
    assert as_text([]) == as_text({}) == "none"
    assert (as_text(True), as_text(None), as_text(3), as_text(0)) == ("yes", "-", "3", "0")
    assert note_block("b", "a text")["pairs"] == [("", "a text")]


def test_summary_on_the_console(report):
    file = io.StringIO()
    print_summary(report, "out", Console(file=file, width=100))
    text = file.getvalue()
    parts = (
        "quantize.round",
        "latency    2.00 ms -> 0.50 ms, 4.00x (onnxruntime, cpu, 2 threads)",
        "out/model.onnx (2 kB)",
        "out/report.html",
        "min_speedup 5: 4, MISSED",
    )
    for part in parts:
        assert part in text, part


# --- a real browser ----------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def open_page(page, folder, scheme="light"):
    """Opens a file in headless Chromium: (console lines, requests of the page, picture)."""
    log, picture = folder / "net.json", folder / "page.png"
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--disable-default-apps", "--disable-extensions", "--metrics-recording-only",
        # the browser's own errands go nowhere
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1120,1400", "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        f"--log-net-log={log}", "--enable-logging=stderr", f"--screenshot={picture}",
    ]  # fmt: skip
    run = subprocess.run(
        [BROWSER, *flags, page.as_uri()],
        capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    parameters = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # Chromium writes "not an origin" for what no page asked for
    requests = {
        p["url"]
        for p in parameters
        if p.get("initiator", "not an origin") != "not an origin" and "url" in p
    }
    return console, requests, picture


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(pair, report, tmp_path, scheme):
    """Nothing on the console, nothing asked of the network, and the scheme's own colours."""
    write_report(report, pair[1], tmp_path)
    console, requests, picture = open_page(tmp_path / "report.html", tmp_path, scheme)
    assert console == []
    assert requests == set()
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    assert image.getpixel((0, 0)) == {"light": (244, 246, 249), "dark": (12, 15, 20)}[scheme]
    assert len(image.resize((112, 140)).getcolors(112 * 140)) > 20  # something is drawn


@needs_browser
def test_the_browser_test_can_fail(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>")
    console, requests, _ = open_page(page, tmp_path)
    assert any("seen" in line for line in console)
    assert requests == {"http://127.0.0.1:9/x.png"}
