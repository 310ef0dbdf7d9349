"""Does a decoder say the same one token at a time as at once?

A cache that is written to the wrong place, or a mask that counts from the wrong end, changes
nothing about a prompt, which is all that other checks look at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphwright.ir.check.fidelity import Fidelity, compare, merge
from graphwright.ir.check.precision import roundoff
from graphwright.ir.errors import ContractError
from graphwright.ir.generation.concat import runner_of
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.program import Program

PROMPTS = (7, 3, 5)
"""Tokens of the prompts of a batch: rows of different lengths."""

STEPS = 3
"""Tokens behind each prompt, one at a time."""

ROUNDINGS = 1024.0
"""Multiple of a unit of rounding that counts as rounding; MOST is never one."""
MOST = 0.1

LOST = 2.0
"""Multiple of what compression loses at once that may be lost in steps."""


def texts(record: Generation, seed: int = 0) -> Tensor:
    """Token ids (rows, longest prompt + steps), int64, random."""
    generator = torch.Generator().manual_seed(seed)
    prompts = PROMPTS if record.mask is not None else (max(PROMPTS),) * len(PROMPTS)
    limit = record.context_length or max(prompts) + STEPS
    length = min(max(prompts) + STEPS, limit)
    return torch.randint(0, record.vocab_size, (len(prompts), length), generator=generator)


def in_steps(runner: Runner, record: Generation, ids: Tensor) -> list[Tensor]:
    """Logits (rows, vocabulary) behind the prompts and behind each further token."""
    counts = _prompts(record, ids)
    runner.start(len(ids), ids.shape[1])
    found = [runner.run(ids[:, : int(counts.max())], counts)]
    for _ in range(ids.shape[1] - int(counts.max())):
        token = ids.gather(1, counts[:, None])
        found.append(runner.run(token, torch.ones_like(counts)))
        counts = counts + 1
    return found


def at_once(runner: Runner, record: Generation, ids: Tensor) -> list[Tensor]:
    """The same logits, each from one run over the text up to there."""
    counts, found = _prompts(record, ids), []
    while int(counts.max()) <= ids.shape[1]:
        runner.start(len(ids), ids.shape[1])
        found.append(runner.run(ids[:, : int(counts.max())], counts))
        counts = counts + 1
    return found


@torch.no_grad()
def by_model(model: nn.Module, record: Generation, ids: Tensor) -> list[Tensor]:
    """The same logits by the model itself, every row alone, without padding and without cache."""
    counts = _prompts(record, ids)
    device = next(model.parameters()).device
    rows = [
        model(input_ids=ids[row : row + 1, : n + ids.shape[1] - int(counts.max())].to(device),
              use_cache=False).logits[0, n - 1 :].float().cpu()
        for row, n in enumerate(counts.tolist())
    ]  # fmt: skip
    return list(torch.stack(rows, 1))


def _prompts(record: Generation, ids: Tensor) -> Tensor:
    longest = ids.shape[1] - STEPS
    prompts = PROMPTS if record.mask is not None else (longest,) * len(PROMPTS)
    return torch.tensor([max(1, min(n, longest)) for n in prompts])


def distance(a: list[Tensor], b: list[Tensor]) -> Fidelity:
    """Between logits of the same places."""
    return merge(compare(one, other) for one, other in zip(a, b, strict=True))


class DecodeCheck:
    """Follows a decoder through a chain of passes.

    Args:
        program: the first program; it has a record.
        seed: of the token ids.
    """

    def __init__(self, program: Program, seed: int = 0) -> None:
        record = Generation.of(program)
        assert record is not None
        self.record = record
        self.ids = texts(record, seed)
        self.first = at_once(runner_of(program, record), record, self.ids)

    @classmethod
    def of(cls, program: Program) -> DecodeCheck | None:
        """The check of a decoder with a cache; None for any other program."""
        record = Generation.of(program)
        return cls(program) if record is not None and record.kind == "decoder" else None

    def hold(self, runner: Runner, unit: float, by: str) -> float:
        """The distance between a text at once and in steps, relative.

        Args:
            runner: of a program or an artifact, over its cache.
            unit: unit of rounding of what it computes in.
            by: who made it, for the message.

        Raises:
            ContractError: it is beyond rounding, and beyond twice of what is lost at once.
        """
        whole = at_once(runner, self.record, self.ids)
        error = distance(whole, in_steps(runner, self.record, self.ids))
        lost = distance(self.first, whole)
        allowed = max(min(MOST, ROUNDINGS * unit), 0.0 if lost.blank else LOST * lost.relative)
        if not error.within(allowed):
            raise ContractError(
                f"{by}: tokens one at a time give other logits than the same text at once: "
                f"relative error {error.relative:.3g}, allowed {allowed:.3g}",
                details=(f"prompts of {list(PROMPTS)} tokens, then {STEPS} steps",),
            )
        return 0.0 if error.blank else error.relative

    def hold_program(self, after: Program, by: str) -> float:
        """The same of a program that PyTorch runs."""
        return self.hold(runner_of(after, self.record), roundoff(after), by)
