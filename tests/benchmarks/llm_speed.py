"""Speed of a pretrained language model on CPUs: prefill of 512 tokens, and decode behind them.

    python tests/benchmarks/llm_speed.py [--threads 2,1] [--rounds 7] [--out out/bench-llm-speed]
        [--genai PYTHON] [--optimum PYTHON] [--llama PYTHON] [--only NAME,...] [--model FOLDER]

SmolLM2-135M-Instruct compiled in float32 and by the ready-made spec `llm-int4`, beside transformers
with its own cache, the int4 model of onnxruntime-genai's builder, optimum-onnx's export and
llama.cpp on the Q4_1 file that the model comes in. Every candidate is a process of its own
(llm_worker.py); they take turns, one prefill and 64 tokens each, and medians are shown. "First
token" is from the loaded library to the first token behind 16; "peak" is the largest resident
memory.

A peer lives in an environment of its own, whose Python is named by the option or by
`GRAPHWRIGHT_PEER_GENAI`, `_OPTIMUM`, `_LLAMA`; without one it is left out, with a line:

    python -m venv venv-genai && venv-genai/bin/pip install onnxruntime-genai==0.18.0 onnx-ir torch
        transformers==5.23.0
    python -m venv venv-optimum && venv-optimum/bin/pip install optimum-onnx==0.1.0 onnxruntime
        torch
    python -m venv venv-llama && venv-llama/bin/pip install llama-cpp-python==0.3.36
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _paths

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from models import smollm2

import graphwright as gw

WORKER = Path(__file__).with_name("llm_worker.py")


@dataclass
class Candidate:
    """What is timed.

    Attributes:
        name: of its row. kind: of the worker. model: file or folder. python: that runs it.
        figures: of every round, by name; milliseconds.
    """

    name: str
    kind: str
    model: Path
    python: str = sys.executable
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def megabytes(self) -> float:
        """Size of the model's files."""
        if self.model.is_file():
            return self.model.stat().st_size / 1e6
        files = [f for f in self.model.iterdir() if f.suffix in (".onnx", ".data", ".safetensors")]
        return sum(f.stat().st_size for f in files) / 1e6

    def note(self, answer: Mapping[str, float]) -> None:
        """Keeps the figures of an answer."""
        for name, value in answer.items():
            self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])


def ours(folder: Path, out: Path) -> list[Candidate]:
    """Our artifacts, made where they are not there yet."""
    (out / "fp32.yaml").write_text("version: 1\nlower: [onnxruntime]\n")
    found = []
    for name, spec in (("fp32", str(out / "fp32.yaml")), ("int4", "llm-int4")):
        place = out / name
        if not place.exists():
            gw.optimize(folder, spec, out=place)
        found.append(Candidate(f"graphwright {name}", "graphwright", place))
    return found


def peers(folder: Path, out: Path, pythons: Mapping[str, str]) -> list[Candidate]:
    """The peers that there are; a line for each that is not."""
    found = [Candidate("transformers fp32", "transformers", folder)]
    if python := pythons["genai"]:
        place = out / "genai"
        build = ["-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(place),
                 "-p", "int4", "-e", "cpu"]  # fmt: skip
        if made(place, [python, *build]):
            found.append(Candidate("onnxruntime-genai's int4", "genai", place, python))
        found.append(
            Candidate("graphwright int4 in onnxruntime-genai", "genai", out / "int4", python)
        )
    if python := pythons["optimum"]:
        place = out / "optimum"
        export = ["-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", str(folder),
                  "--task", "text-generation-with-past", str(place)]  # fmt: skip
        if made(place, [python, *export]):
            found.append(Candidate("optimum-onnx fp32", "optimum", place, python))
    if python := pythons["llama"]:
        found.append(Candidate("llama.cpp Q4_1", "llama.cpp", smollm2.gguf_file(), python))
    return found


def made(place: Path, command: Sequence[str]) -> bool:
    """Whether a peer's own model is there, made by its own tool where it was not."""
    if not place.exists():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"left out: {' '.join(command[1:3])} failed: {done.stderr.strip()[-300:]}")
            return False
    return True


def python_of(peer: str, given: str | None, module: str) -> str:
    """The Python that has a peer: named, or this one; empty, with a line, where none has."""
    named = given or os.environ.get(f"GRAPHWRIGHT_PEER_{peer.upper()}", "")
    if named or importlib.util.find_spec(module):
        return named or sys.executable
    print(f"left out: {peer} (no --{peer} PYTHON, and no {module} here)")
    return ""


class Worker:
    """A candidate's process."""

    def __init__(self, candidate: Candidate, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [
            candidate.python,
            str(WORKER),
            candidate.kind,
            str(candidate.model),
            str(threads),
        ]
        self.candidate = candidate
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        self.answer()

    def round(self) -> None:
        """One prefill and the tokens behind it."""
        assert self.process.stdin is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        self.answer()

    def answer(self) -> None:
        """Waits for the next line of figures."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                self.candidate.note(json.loads(line[1:]))
                return
        assert self.process.stderr is not None
        raise RuntimeError(f"{self.candidate.name}: {self.process.stderr.read()[-500:]}")

    def end(self) -> None:
        """Lets the process end."""
        self.process.communicate()


def timed(candidates: Sequence[Candidate], threads: int, rounds: int) -> list[Candidate]:
    """Runs everything in turn; a candidate that fails is left out, with a line."""
    workers = []
    for candidate in candidates:
        candidate.figures.clear()
        try:
            workers.append(Worker(candidate, threads))
        except RuntimeError as error:
            print(f"left out: {error}")
    for worker in workers:
        worker.round()  # warm
        for name in ("prefill", "decode"):
            worker.candidate.figures[name].clear()
    for _ in range(rounds):
        for worker in workers:
            worker.round()
    for worker in workers:
        worker.end()
    return [worker.candidate for worker in workers]


def main() -> None:
    """Makes the models, times them, prints a table per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="2,1", help="numbers of threads, comma separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names of candidates, comma separated")
    parser.add_argument("--out", type=Path, default=_paths.ROOT / "out" / "bench-llm-speed")
    parser.add_argument("--model", type=Path, help="another folder of transformers than SmolLM2's")
    for peer in ("genai", "optimum", "llama"):
        parser.add_argument(f"--{peer}", help="Python of the peer's environment")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    modules = {"genai": "onnxruntime_genai", "optimum": "optimum.onnxruntime", "llama": "llama_cpp"}
    pythons = {p: python_of(p, getattr(options, p), m.split(".")[0]) for p, m in modules.items()}
    folder = options.model or smollm2.folder()
    everything = [*ours(folder, options.out), *peers(folder, options.out, pythons)]
    wanted = options.only.split(",") if options.only else [one.name for one in everything]
    for threads in map(int, options.threads.split(",")):
        load = os.getloadavg()[0]
        found = timed([c for c in everything if c.name in wanted], threads, options.rounds)
        base = next((c for c in found if c.kind == "transformers"), found[0])
        print(f"\n{threads} threads; load of the machine before: {load:.1f}\n")
        print("| | file MB | first token s | peak MB | prefill 512 ms | decode ms per token |\n"
              "| --- | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
        for one in found:
            first = one.figures["load"][0] + one.figures["first"][0]
            cells = [
                f"{one.median(name):.{digits}f} ({base.median(name) / one.median(name):.2f}x)"
                for name, digits in (("prefill", 0), ("decode", 1))
            ]
            peak = max(one.figures["peak_mb"])
            print(f"| {one.name} | {one.megabytes:.1f} | {first:.2f} | {peak:.0f} | "
                  f"{' | '.join(cells)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
