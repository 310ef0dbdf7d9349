"""What a run shows while it works."""

import io
import time

import pytest
from rich.console import Console

from graphwright.job import progress as module
from graphwright.job.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def write_to(terminal=False):
    file = io.StringIO()
    return file, Console(file=file, force_terminal=terminal, width=80)


def test_long_stages_leave_a_line_and_short_ones_nothing(clock):
    file, console = write_to()
    with Progress(console=console) as progress:
        with progress.stage("quick"):
            clock.now += 0.5
        with progress.stage("quantize.int8"):
            progress.update("layer fc1", 1, 12)
            clock.now += 12.34
    assert file.getvalue() == "quantize.int8: 12.3 s\n"


def test_quiet_says_nothing(clock):
    file, console = write_to()
    with Progress(quiet=True, console=console) as progress, progress.stage("long"):
        progress.update("x", 1, 2)
        progress.note("hello")
        clock.now += 60
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar_for_the_stage():
    file, console = write_to(terminal=True)
    with Progress(console=console) as progress, progress.stage("trace [bold]x"):
        progress.update("blocks", 3, 12)
        progress._show(progress._stages[-1])  # what the timer does after a second
        progress.update("blocks", 4, 12)
    text = file.getvalue()
    assert "trace [bold]x: blocks" in text  # names are text, not markup
    assert "3/12" in text or "4/12" in text


def test_a_stage_that_has_ended_gets_no_bar_any_more():
    file, console = write_to(terminal=True)
    with Progress(console=console) as progress:
        with progress.stage("s"):
            stage = progress._stages[-1]
        progress._show(stage)
    assert file.getvalue() == ""


def test_failure_passes_through_and_ends_the_stage():
    _, console = write_to(terminal=True)
    progress = Progress(console=console)

    def fail():
        with progress, progress.stage("s"):
            progress._show(progress._stages[-1])
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert progress._stages == []
    assert progress._bars is None


def test_update_outside_of_a_stage_is_harmless():
    file, console = write_to()
    progress = Progress(console=console)
    progress.update("x", 1, 2)
    progress.note("[red]as it is[/red]")
    assert file.getvalue() == "[red]as it is[/red]\n"


def test_a_bar_follows_what_is_said_of_the_stage():
    _, console = write_to(terminal=True)
    with Progress(console=console) as progress, progress.stage("gptq"):
        progress.update("layer a", 1, 0)  # of unknown length
        progress._show(progress._stages[-1])
        (bar,) = progress._bars.tasks
        assert (bar.description, bar.completed, bar.total) == ("gptq: layer a", 1, None)
        progress.update("layer b", 5, 12)
        (bar,) = progress._bars.tasks
        assert (bar.description, bar.completed, bar.total) == ("gptq: layer b", 5, 12)
        progress.update("layer c", 6, 0)
        assert progress._bars.tasks[0].completed == 6


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_shows_itself_once_it_has_lasted_and_on_a_terminal_only(monkeypatch, terminal):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    _, console = write_to(terminal=terminal)
    with Progress(console=console) as progress, progress.stage("s"):
        end = time.perf_counter() + (10 if terminal else 0.2)
        while progress._bars is None and time.perf_counter() < end:
            time.sleep(0.01)
        assert (progress._bars is not None) is terminal


def test_lines_have_no_colours_of_their_own():
    file, console = write_to(terminal=True)
    Progress(console=console).note("12 layers of 'net', 3.5 MB")
    assert file.getvalue() == "12 layers of 'net', 3.5 MB\n"
