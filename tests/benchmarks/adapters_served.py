"""One ONNX model, three adapters: outputs, and the time of a switch.

    python tests/benchmarks/adapters_served.py          2 minutes on a core

The pretrained sentence encoder is lowered once with `adapters: switchable`; adapters of ranks 4, 8
and 16 with random factors are files beside it. "Error" compares one session that changes its
adapter before every call with a session of the merged model. All run in turn, call by call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]

import torch
from benchmarks.adapters_encoder import PAIR, Classifier, trace
from models.adapters import moved

import graphwright as gw
from graphwright.passes import adapt

RANKS = (4, 8, 16)


def main() -> None:
    """Writes the artifacts, compares and times them."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=30, help="of every adapter")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "served")
    given = parser.parse_args()
    ids = torch.randint(1000, 30000, (1, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    base = trace(Classifier(10, 0), batch)
    targets = PAIR["targets"]
    programs = {
        f"rank {rank}": moved(adapt.Lora(rank=rank, targets=targets)(base, check=False), rank, 0.02)
        for rank in RANKS
    }
    given.out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, program in programs.items():
        files[name] = given.out / f"{name.replace(' ', '_')}.onnx_adapter"
        gw.save_onnx_adapter(program, files[name])
    first = next(iter(programs.values()))
    gw.lower(first, "onnxruntime", adapters="switchable").save(given.out / "base")
    served: Any = gw.load(given.out / "base")
    merged: dict[str, Any] = {
        name: gw.lower(adapt.Merge()(program), "onnxruntime") for name, program in programs.items()
    }
    plain = base(**batch).detach()
    times: dict[str, list[float]] = {key: [] for key in ("switch", "switched", "merged")}
    errors = dict.fromkeys(programs, 0.0)
    effect = dict.fromkeys(programs, 0.0)

    def clocked(key: str, call: Any) -> Any:
        begin = time.process_time()
        result = call()
        times[key].append(time.process_time() - begin)
        return result

    for _ in range(given.calls):
        for name in programs:
            clocked("switch", lambda name=name: served.use_adapter(files[name]))
            ours = clocked("switched", lambda: served(**batch))
            wanted = clocked("merged", lambda name=name: merged[name](**batch))
            scale = float(wanted.abs().max())
            errors[name] = max(errors[name], float((ours - wanted).abs().max()) / scale)
            effect[name] = float((wanted - plain).abs().max()) / scale
    print("| adapter | file MB | error to the merged model | change by the adapter |")
    print("| --- | ---: | ---: | ---: |")
    for name, file in files.items():
        print(f"| {name} | {file.stat().st_size / 1e6:.2f} | {errors[name]:.1e} "
              f"| {effect[name]:.2f} |")  # fmt: skip
    middle = {key: 1000 * statistics.median(seconds) for key, seconds in times.items()}
    print(f"\n{len(times['switch'])} switches: {middle['switch']:.2f} ms each; a call "
          f"{middle['switched']:.2f} ms switched, {middle['merged']:.2f} ms merged")  # fmt: skip


if __name__ == "__main__":
    main()
