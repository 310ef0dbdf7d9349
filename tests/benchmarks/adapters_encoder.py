"""Every adapter on the pretrained sentence encoder: which package does a docstring come from?

    python tests/benchmarks/adapters_encoder.py                      every row, 3 seeds
    python tests/benchmarks/adapters_encoder.py lora pissa           some rows, and PEFT's LoRA
    python tests/benchmarks/adapters_encoder.py --speed              only the steps per second

The encoder is frozen, but for the adapter beside the chosen layers and a fresh classifier. Texts
are cut at `--tokens`, dropout is off, every row reads the same batches in the same order. PEFT's
LoRA is trained by a plain loop with the same optimizer and schedule. For speed, ours and PEFT's
take turns, `CHUNK` steps each, and PEFT starts from the adapter that ours has written.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.docstrings import classified
from benchmarks.step_memory import peak_bytes
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.ir.tune.schedule import lr_factor
from graphwright.passes import adapt
from graphwright.passes.training import training_hooks

BATCH, RANK, CHUNK, ROUNDS = 16, 8, 8, 8
POOL = 13
"""Batches that are sorted by length together."""
LR = 5e-3
PAIR: dict[str, Any] = {"targets": ["*.query", "*.value"], "also_train": ["head"]}
BLOCK: dict[str, Any] = {**PAIR, "targets": ["*.intermediate.dense"]}
OUTPUTS: dict[str, Any] = {**PAIR, "targets": ["*.output.dense"]}
Batch = dict[str, Tensor]
Make = Callable[[gw.Program, list[Batch], int], gw.Program]


@dataclass(frozen=True)
class Row:
    """One way to tune. `lr` is a factor of the common learning rate."""

    make: Make
    lr: float = 1.0
    beside: str = "query, value"


def alone(kind: Any, **options: Any) -> Make:
    """An adapter without more."""

    def make(program: gw.Program, batches: list[Batch], seed: int) -> gw.Program:
        made: gw.Program = kind(**options)(program, training=batches, seed=seed, check=False)
        return made

    return make


def head_only(program: gw.Program, batches: list[Batch], seed: int) -> gw.Program:
    """Everything frozen but the classifier."""
    state: dict[str, Any] = {
        name: nn.Parameter(t.detach(), requires_grad=name.startswith("head."))
        if isinstance(t, nn.Parameter) else t
        for name, t in program.state.items()
    }  # fmt: skip
    return program.replace(state=state)


def with_few_rows(program: gw.Program, batches: list[Batch], seed: int) -> gw.Program:
    """LoRA, whose layers keep 30% of their rows."""
    adapted = adapt.Lora(rank=RANK, **PAIR)(program, seed=seed, check=False)
    made: gw.Program = adapt.WtaCrs(targets=PAIR["targets"])(adapted, check=False)
    return made


ROWS: dict[str, Row] = {
    "head alone": Row(head_only, 2.0, beside=""),
    "lora": Row(alone(adapt.Lora, rank=RANK, **PAIR)),
    "dora": Row(alone(adapt.Dora, rank=RANK, **PAIR)),
    "allora": Row(alone(adapt.Allora, rank=RANK, eta=2.0, **PAIR)),
    "pissa": Row(alone(adapt.Pissa, rank=RANK, **PAIR)),
    "lora_xs": Row(alone(adapt.LoraXs, rank=RANK, alpha=float(RANK), **PAIR), 4.0),
    "lora_sb": Row(alone(adapt.LoraSb, rank=RANK, **PAIR), 4.0),
    "loldu": Row(alone(adapt.Loldu, rank=RANK, **PAIR), 10.0),
    "krona": Row(alone(adapt.Krona, **PAIR)),
    "pego": Row(alone(adapt.Pego, rank=RANK // 4, **PAIR)),
    "ia3": Row(alone(adapt.Ia3, **PAIR), 4.0),
    "bottleneck": Row(alone(adapt.Bottleneck, width=RANK, **OUTPUTS), beside="output.dense"),
    "s2ft": Row(alone(adapt.S2ft, share=0.03, **OUTPUTS), beside="output.dense"),
    "sara": Row(alone(adapt.Sara, share=0.04, **PAIR)),
    "wta_crs": Row(with_few_rows),
    "full": Row(lambda program, batches, seed: program, 0.06, "everything"),
}
PEFT = "PEFT lora"


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        from prepare import model_folder
        from transformers import AutoModel

        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.encoder = AutoModel.from_pretrained(model_folder(), dtype=torch.float32, **off)
        torch.manual_seed(seed)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(mean)
        return logits


class Data:
    """Tokenized texts."""

    def __init__(self, tokens: int) -> None:
        from prepare import load_tokenizer, model_folder

        self.train, self.test, self.names = classified()
        self.tokenizer = load_tokenizer(model_folder())
        self.tokenizer.enable_truncation(tokens)

    @cached_property
    def program(self) -> gw.Program:
        """The classifier, traced once."""
        return trace(Classifier(len(self.names), 0), self.batch(self.train[:BATCH]))

    def batch(self, items: Sequence[tuple[str, int]]) -> Batch:
        """Inputs and labels, padded to the longest text."""
        encoded = self.tokenizer.encode_batch([text for text, _ in items])
        return {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            "labels": torch.tensor([label for _, label in items]),
        }

    def batches(self, seed: int) -> list[Batch]:
        """An epoch in an order of its own, texts of about one length together."""
        draw = random.Random(seed)
        order = draw.sample(self.train, len(self.train))
        pools = [order[s : s + POOL * BATCH] for s in range(0, len(order), POOL * BATCH)]
        order = [item for pool in pools for item in sorted(pool, key=lambda item: len(item[0]))]
        groups = [order[s : s + BATCH] for s in range(0, len(order) - BATCH + 1, BATCH)]
        return [self.batch(group) for group in draw.sample(groups, len(groups))]

    def accuracy(self, run: Callable[..., Tensor]) -> float:
        """Share of the test texts whose package is named."""
        right = 0
        texts = sorted(self.test, key=lambda item: len(item[0]))
        with torch.no_grad():
            for start in range(0, len(texts), 32):
                batch = self.batch(texts[start : start + 32])
                labels = batch.pop("labels")
                right += int((run(**batch).argmax(-1) == labels).sum())
        return right / len(texts)


class Clock(Hook):
    """Processor time at the end of every step: other work on the machine has no part in it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_step(self, at: Moment) -> None:
        self.ends.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        """Seconds of every step but the first."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def trace(model: Classifier, batch: Batch) -> gw.Program:
    """The classifier with a free number of texts and tokens."""
    example = {name: batch[name] for name in ("input_ids", "attention_mask")}
    program: gw.Program = gw.trace(
        model.eval(), example, dynamic={name: {0: "batch", 1: "tokens"} for name in example}
    )
    return program


def with_head(program: gw.Program, model: Classifier) -> gw.Program:
    """The program with the classifier of a model, so that every row need not be traced."""
    head = {name: t for name, t in model.state_dict(keep_vars=True).items() if "head." in name}
    assert set(head) <= set(program.state)
    return program.replace(state={**program.state, **head})


def options_of(steps: int, lr: float) -> TuneOptions:
    return TuneOptions(steps=steps, lr=lr, warmup=steps // 10)


def ours(
    program: gw.Program, batches: list[Batch], options: TuneOptions
) -> tuple[gw.Program, list[float], Clock]:
    """The trained program, its losses and its times."""
    clock = Clock()
    hooks = [*training_hooks(program), clock]
    tuned = tune(program, batches, options, Context(seed=0), hooks=hooks)
    return tuned.program, list(tuned.history.losses), clock


class Peft:
    """PEFT's LoRA in a plain loop."""

    def __init__(self, model: Classifier, folder: str = "") -> None:
        import peft

        if folder:
            self.model: Any = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        else:
            config = peft.LoraConfig(
                r=RANK, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["head"]
            )
            self.model = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step = 0

    def train(self, batches: list[Batch], options: TuneOptions, steps: int) -> list[float]:
        """Takes so many steps from where it stands; the losses. `seconds` has their times."""
        if not self.step:
            self.optimizer = torch.optim.AdamW(self.trained, lr=options.lr, weight_decay=0.0)
        losses, self.seconds, self.peak = [], [], 0
        for _ in range(steps):
            begin = time.process_time()
            losses.append(self._one(batches[self.step % len(batches)], options))
            self.seconds.append(time.process_time() - begin)
            self.step += 1
        return [float(loss) for loss in losses]

    def _one(self, batch: Batch, options: TuneOptions) -> Tensor:
        assert options.steps is not None
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(options, self.step, options.steps)
        self.optimizer.zero_grad()
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@dataclass
class Result:
    """What one run gave."""

    accuracy: float
    losses: list[float]
    trained: int
    peak: int
    seconds: float


def run_ours(row: Row, data: Data, seed: int, epochs: int, lr: float) -> Result:
    """A row with one seed."""
    batches = [b for epoch in range(epochs) for b in data.batches(100 * seed + epoch)]
    program = with_head(data.program, Classifier(len(data.names), seed))
    adapted = row.make(program, batches, seed)
    trained = sum(
        p.numel() for n, p in adapted.trainable().items() if n.partition(".")[0] != "head"
    )
    peak = 0
    if not seed:
        once = options_of(1, LR)
        peak = peak_bytes(lambda: ours(adapted, batches[:1], once))
    options = options_of(len(batches), lr * row.lr)
    tuned, losses, clock = ours(adapted, batches, options)
    seconds = statistics.median(clock.steps)
    return Result(data.accuracy(tuned), losses, trained, peak, seconds)


def run_peft(data: Data, seed: int, epochs: int, lr: float) -> Result:
    """PEFT's LoRA with one seed."""
    batches = [b for epoch in range(epochs) for b in data.batches(100 * seed + epoch)]
    model = Classifier(len(data.names), seed)
    peft = Peft(model)
    head = sum(p.numel() for p in model.head.modules_to_save.parameters())  # type: ignore[operator, union-attr]
    trained = sum(p.numel() for p in peft.trained) - head
    peak = 0
    if not seed:
        probe = Peft(Classifier(len(data.names), seed))
        peak = peak_bytes(lambda: probe.train(batches[:1], options_of(1, LR), 1))
    losses = peft.train(batches, options_of(len(batches), lr), len(batches))
    seconds = statistics.median(peft.seconds)
    peft.model.eval()
    return Result(data.accuracy(peft.model), losses, trained, peak, seconds)


def speed(data: Data, rounds: int) -> None:
    """Ours and PEFT's LoRA from one start, in turns."""
    batches = data.batches(0)
    adapted = adapt.Lora(rank=RANK, **PAIR)(data.program, check=False)
    with tempfile.TemporaryDirectory() as folder:
        gw.save_adapter(adapted, folder)
        peft = Peft(Classifier(len(data.names), 0), folder)
    options = options_of(rounds * CHUNK, LR)
    _, first, _ = ours(adapted, batches, options.model_copy(update={"steps": CHUNK}))
    times: dict[str, list[float]] = {"ours": [], PEFT: []}
    theirs: list[float] = []
    for number in range(rounds):
        chunk = batches[number * CHUNK % len(batches) :][:CHUNK]
        theirs += peft.train(batches, options, CHUNK)
        times[PEFT] += peft.seconds[1:]
        _, _, clock = ours(adapted, chunk, options.model_copy(update={"steps": CHUNK}))
        times["ours"] += clock.steps
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times[PEFT], strict=True))
    apart = max(abs(a - b) / abs(b) for a, b in zip(first[:1], theirs, strict=False))
    print(f"steps per second, ours {1 / middle['ours']:.2f}, {PEFT} {1 / middle[PEFT]:.2f}: "
          f"ratio {ratio:.3f}, median over {len(times['ours'])} batches; "
          f"first loss apart by {apart:.1e}")  # fmt: skip


def line(name: str, row: Row | None, lr: float, results: Sequence[Result]) -> str:
    """A row of the table."""
    right = [100 * r.accuracy for r in results]
    spread = statistics.stdev(right) if len(right) > 1 else 0.0
    early = statistics.mean(statistics.mean(_early(r.losses)) for r in results)
    last = statistics.mean(statistics.mean(r.losses[-10:]) for r in results)
    beside, lr = ("query, value", lr) if row is None else (row.beside, lr * row.lr)
    return (f"| {name} | {beside} | {lr:g} | {results[0].trained:,} | {statistics.mean(right):.1f} "
            f"± {spread:.1f} | {early:.3f} | {last:.3f} | {results[0].peak / 2**20:.1f} "
            f"| {1000 * statistics.median(r.seconds for r in results):.0f} |")  # fmt: skip


def _early(losses: list[float]) -> list[float]:
    middle = len(losses) // 4
    return losses[max(0, middle - 5) : middle + 5]


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the speed comparison")
    parser.add_argument("--speed", action="store_true", help="nothing but the speed comparison")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    data = Data(given.tokens)
    print(f"{len(data.train)} texts to train on, {len(data.test)} held out, "
          f"{len(data.names)} packages; torch {torch.__version__}", flush=True)  # fmt: skip
    speed(data, given.rounds)
    if given.speed:
        return
    print("| adapter | beside | lr | trained | accuracy % | loss after a quarter "
          "| last loss | step MiB | step ms |\n"
          "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    seeds = range(given.seeds)
    theirs = [run_peft(data, seed, given.epochs, given.lr) for seed in seeds]
    print(line(PEFT, None, given.lr, theirs), flush=True)
    for name in given.rows or ROWS:
        row = ROWS[name]
        results = [run_ours(row, data, seed, given.epochs, given.lr) for seed in seeds]
        print(line(name, row, given.lr, results), flush=True)


if __name__ == "__main__":
    main()
