"""Agreement: whether the result writes what the original writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.evaluation.meters import Inputs, Meter, Runner
from graphwright.evaluation.scoring import IGNORED_LABEL, main_output, scorer_of
from graphwright.evaluation.texts import MASK, text_inputs
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import runner_of
from graphwright.ir.generation.record import Generation
from graphwright.ir.program import Program

STEPS = 64
"""Greedy tokens behind each prompt, where a spec does not say how many."""


class Agreement(Meter):
    """Share of greedy steps at which the result names the original's token.

    The original goes on greedily behind every prompt, and the result is asked for the next token at
    each step of that same text. So one difference counts as one, however differently the result
    would have gone on behind it; up to the first, both have written the same.
    """

    name = "agreement"

    def __init__(self, original: Program, result: Any, steps: int = STEPS) -> None:
        super().__init__()
        self.original, self.steps = original, steps
        self.scorers = scorer_of(original), scorer_of(result)
        self.counted = self.until_first = self.prompts = 0

    def add(self, original: Runner, result: Runner, inputs: Inputs, labels: Tensor | None) -> None:
        """Takes one batch of prompts, padded on the right."""
        ids = inputs["input_ids"]
        mask = inputs.get(MASK, torch.ones_like(ids))
        self.prompts += len(ids)
        texts, lengths = continued(self.original, ids, mask.sum(1), self.steps)
        places = torch.arange(texts.shape[1])
        is_new = (places >= mask.sum(1)[:, None]) & (places < lengths[:, None])
        own = texts.where(is_new, torch.tensor(IGNORED_LABEL))
        given = text_inputs(self.original.signature, texts, lengths)
        before, after = (scorer(given, own).is_greedy for scorer in self.scorers)
        self.has_values = self.has_values or bool(before.any())
        self.counted += int(is_new.sum())
        self.samples = self.counted
        self.before += float(before.sum())
        self.after += float(after.sum())
        differs = (is_new[:, 1:] & ~after).cummax(1).values
        self.until_first += int((is_new[:, 1:] & ~differs).sum())

    @property
    def what(self) -> str:  # type: ignore[override]
        """What was compared, with the mean length of what both write alike."""
        how = self.scorers[1].how
        return (
            f"{self.counted} greedy steps behind {self.prompts} texts; up to the first difference "
            f"{self.until_first / max(self.prompts, 1):.1f} of "
            f"{self.counted / max(self.prompts, 1):.1f} tokens" + (f"; {how}" if how else "")
        )


def continued(program: Program, ids: Tensor, lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Texts with the tokens that a program writes greedily behind them.

    Args:
        program: with a cache, or the logits of whole texts.
        ids: int64 (batch, tokens), padded on the right.
        lengths: real tokens of every row.
        steps: tokens to write; a row ends early with a token that ends texts.

    Returns:
        texts, int64 (batch, tokens + steps), padded on the right; and their lengths.

    Raises:
        ArgumentError: a text would be longer than the model's context.
    """
    record = Generation.of(program)
    runner = None if record is None else runner_of(program, record)
    eos: tuple[int, ...] = ()
    _check_room(program, int(lengths.max()) + steps)
    texts = torch.cat([ids, ids.new_zeros(len(ids), steps)], 1)
    lengths, rows = lengths.clone(), torch.arange(len(ids))
    runs = torch.ones(len(ids), dtype=torch.bool)
    logits = None
    if runner is not None and record is not None:
        eos = record.eos
        runner.start(len(ids), texts.shape[1])
        logits = runner.run(ids, lengths)
    for _ in range(steps):
        if runner is None or logits is None:
            whole = main_output(program(**text_inputs(program.signature, texts, lengths)))[1]
            logits = whole[rows, lengths - 1]
        tokens = logits.argmax(-1).cpu()
        texts[rows[runs], lengths[runs]] = tokens[runs]
        lengths += runs.long()
        runs = runs & ~torch.isin(tokens, torch.tensor(eos, dtype=torch.int64))
        if not runs.any():
            break
        if runner is not None:
            logits = runner.run(tokens[:, None], runs.long())
    return texts[:, : int(lengths.max())], lengths


def _check_room(program: Program, needed: int) -> None:
    record = Generation.of(program)
    most = record.context_length if record is not None else None
    spec = next(spec for spec in program.signature.inputs if spec.name == "input_ids")
    length = spec.shape[1]
    if isinstance(length, int):
        raise ArgumentError(
            f"the program takes texts of {length} tokens only, and cannot go on behind one",
            fix="Trace it with a free length.",
        )
    if record is None:
        most = program.signature.dims[length].max if length in program.signature.dims else None
    if most is not None and needed > most:
        raise ArgumentError(
            f"a prompt and what is written behind it take {needed} tokens, and the model's context "
            f"is {most}",
            fix="Give `evaluate` a `max_length` for the prompts, or fewer `steps`.",
        )
