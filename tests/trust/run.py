"""Counts caught faults, false alarms, and what becomes of random chains.

python tests/trust/run.py faults 100
python tests/trust/run.py right 100
python tests/trust/run.py chains 300
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trust.chains import BACKENDS, beyond_the_declared, draw_chains, legal, prepare, run_chain
from trust.faults import draw_faults
from trust.judge import STAGES, draw_right, false_alarm, is_caught
from trust.nets import NETS


def faults(count: int) -> None:
    """How many of so many faults are caught, at three stages in turn."""
    caught = 0
    for number, fault in enumerate(itertools.islice(draw_faults(seed=0), count)):
        stage = STAGES[number // 5 % len(STAGES)]
        if is_caught(fault, stage):
            caught += 1
        else:
            print(f"missed in {stage}: {fault.kind}, {fault.net}, {fault.what}", flush=True)
    print(f"{caught} of {count} faults caught")


def right(count: int) -> None:
    """How many of so many right passes and lowerings are complained of."""
    alarms = 0
    for name, seed, what in itertools.islice(draw_right(), count):
        said = false_alarm(NETS[name].program(seed), what)
        if said:
            alarms += 1
            print(f"false alarm: {what} on {name}, seed {seed}: {said}", flush=True)
    print(f"{alarms} false alarms in {count} right passes and lowerings")


def chains(count: int) -> None:
    """What becomes of so many random chains that the check of a spec lets pass."""
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        drawn = (
            (name, chain, place)
            for name, chain in draw_chains(seed=0)
            if legal(chain, place := prepare(name, Path(folder)))
        )
        for name, chain, place in itertools.islice(drawn, count):
            run = run_chain(name, chain, place, BACKENDS)
            wrong = beyond_the_declared(run, place) if run.ended == "done" else []
            ended["beyond the declared losses" if wrong else run.ended] += 1
            if run.ended != "done" or wrong:
                said = "; ".join(wrong) or run.said.partition("\n")[0]
                print(f"{run.ended}: {name} {' -> '.join(chain)}: {said}", flush=True)
    print(", ".join(f"{what} {times}" for what, times in ended.most_common()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"faults": faults, "right": right, "chains": chains}[sys.argv[1]](int(sys.argv[2]))
