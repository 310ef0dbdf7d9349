"""What is measured, in what order, and for how long; never how fast anything is."""

import gc
import time

import pytest
import torch

from graphwright.job import latency
from graphwright.job.latency import alternate, measure_latency


class Clock:
    """A clock that only the measured calls move."""

    def __init__(self, monkeypatch):
        self.begin = self.now = 1000.0  # clocks start anywhere
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def call(self, seconds, log=None, name=""):
        def run():
            if log is not None:
                log.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


def test_medians_and_quartiles(monkeypatch):
    clock = Clock(monkeypatch)
    times = iter([9.0, 9.0] + [0.001, 0.002, 0.003, 0.004, 0.1] * 100)
    found = alternate({"a": clock.call(lambda: next(times))}, budget_s=18.0 + 5 * 0.022)
    assert found["a"].runs % 5 == 0  # the two warm-up calls are not among them
    assert found["a"].median_ms == pytest.approx(3.0)
    assert found["a"].iqr_ms == pytest.approx(2.0)


def test_candidates_take_turns(monkeypatch):
    clock, log = Clock(monkeypatch), []
    names = ("a", "b", "c")
    found = alternate({n: clock.call(0.1, log, n) for n in names}, budget_s=3.0)
    runs = found["a"].runs
    assert runs == found["b"].runs == found["c"].runs
    measured = log[-3 * runs :]
    rounds = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert all(set(r) == set(names) for r in rounds)
    assert [r[0] for r in rounds[:3]] == ["a", "b", "c"]  # nobody is always first


def test_budget_is_kept_but_three_rounds_are_run(monkeypatch):
    clock = Clock(monkeypatch)
    found = alternate({"quick": clock.call(0.01)}, budget_s=2.0)
    assert clock.now - clock.begin <= 2.0 + 0.02
    assert found["quick"].runs > 50
    slow = alternate({"slow": clock.call(5.0)}, budget_s=1.0)
    assert slow["slow"].runs == 3


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 5), (0.01, 20), (2.0, 2)])
def test_a_quarter_of_the_budget_warms_up(monkeypatch, seconds, calls):
    """At least two calls, and never more than twenty."""
    clock, log = Clock(monkeypatch), []
    found = alternate({"a": clock.call(seconds, log)}, budget_s=2.0)
    assert len(log) - found["a"].runs == calls


def test_calls_that_take_no_time_come_to_an_end(monkeypatch):
    clock = Clock(monkeypatch)
    assert alternate({"a": clock.call(0.0)}, budget_s=1.0)["a"].runs == 400


def test_progress_is_told_in_milliseconds_of_the_budget(monkeypatch):
    clock, said = Clock(monkeypatch), []
    found = alternate(
        {"a": clock.call(0.5)}, budget_s=4.0, progress=lambda *what: said.append(what)
    )
    assert said == [("latency", 500 * (2 + i), 4000) for i in range(found["a"].runs)]
    said.clear()
    alternate({"a": clock.call(3.0)}, budget_s=4.0, progress=lambda *what: said.append(what))
    assert [done for _, done, _ in said] == [4000] * 3  # never beyond the end


def test_device_is_waited_for_before_every_reading():
    log = []
    alternate({"a": lambda: log.append("call")}, 0.0, synchronize=lambda: log.append("wait"))
    measured = log[3:]  # two warm-up calls and their wait
    assert measured == ["wait", "call", "wait"] * 3


def test_collector_is_put_back():
    seen = []
    alternate({"a": lambda: seen.append(gc.isenabled())}, 0.0)
    assert gc.isenabled()
    assert seen[-1] is False


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        alternate({"a": lambda: None}, 0.0)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("device", "waits"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_a_gpu_is_waited_for(monkeypatch, device, waits):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    call = {"triton": lambda x: log.append("after")}
    measure_latency(lambda x: log.append("before"), call, [torch.ones(1)], device=device,
                    budget_s=0.0)  # fmt: skip
    assert ("wait" in log) is waits
    assert log[-1] == ("wait" if waits else log[-1])


def test_rows_of_the_report():
    x = torch.ones(2, 3)
    modes = []

    def slow(value):
        modes.append(torch.is_inference_mode_enabled())
        time.sleep(0.004)

    rows = measure_latency(slow, {"onnxruntime": lambda v: time.sleep(0.001)}, [x], budget_s=0.1)
    (row,) = rows
    assert row["backend"] == "onnxruntime"
    assert row["device"] == "cpu"
    assert row["threads"] == torch.get_num_threads()
    assert row["speedup"] == pytest.approx(row["before_ms"] / row["after_ms"])
    assert row["before_ms"] >= 4.0
    assert row["shapes"] == [[2, 3]]
    assert all(modes)
    assert measure_latency(slow, {}, [x]) == []
