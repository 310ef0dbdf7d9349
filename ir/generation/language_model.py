"""`generate` and conversations over whatever runs a decoder: an artifact or a program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.conversation import Conversation
from graphwright.ir.generation.decode import Completion, generate_rows, search_beams
from graphwright.ir.generation.prompts import read_prompts
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.generation.session import Session
from graphwright.ir.generation.settings import Settings, resolve, unmet
from graphwright.ir.generation.stops import Stops
from graphwright.ir.generation.text import Tokenizer, open_tokenizer
from graphwright.ir.program import Program


def language_model(program: Program) -> LanguageModel:
    """A program that generates, run by PyTorch: what passes made of a model, before lowering.

    Raises:
        ArgumentError: it is no decoder with a cache.
    """
    record = Generation.of(program)
    if record is None:
        raise ArgumentError(
            "this program has no cache to generate with",
            fix="Trace the model with `model: {task: generation}`.",
        )

    def run_flat(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return program.run_flat(inputs)

    folder = None if record.tokenizer is None else Path(record.tokenizer)
    return LanguageModel(record, lambda: ConcatRunner(record, program.signature, run_flat), folder)


class LanguageModel:
    """A decoder that runs, with its tokenizer and its defaults where it has some.

    Attributes:
        record: what generation knows of the model.
        folder: with the tokenizer's files; None where there is none.
    """

    def __init__(
        self, record: Generation, runner: Callable[[], Runner], folder: Path | None
    ) -> None:
        self.record = record
        self.folder = folder
        self._make_runner = runner

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None for a model that came without one."""
        return None if self.folder is None else open_tokenizer(self.folder)

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """The model's own options of generation; a warning names those that have no part here."""
        if left_out := unmet(self.record.sampling):
            warnings.warn(
                f"the model's own defaults {', '.join(left_out)} have no part in this generation",
                stacklevel=2,
            )
        return self.record.sampling

    def generate(
        self,
        prompts: Any,
        *,
        attention_mask: torch.Tensor | None = None,
        streamer: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Generates behind prompts.

        Args:
            prompts: a text, token ids or messages, or a list of such; see `read_prompts`.
            attention_mask: of a tensor [batch, tokens] of ids: 0 on padding, at any side.
            streamer: gets the text of the one sequence, piece by piece.
            options: of `Settings`: `max_new_tokens`, `stop`, `do_sample`, `temperature`, `top_k`,
                `top_p`, `min_p`, `repetition_penalty`, `num_beams`, `length_penalty`,
                `num_return_sequences`, `seed`.

        Returns:
            A completion where one prompt was given and one sequence asked for; else a list, the
            sequences of a prompt one behind the other.

        Raises:
            ArgumentError: a prompt of another form, longer than the context, or with unknown
                tokens; options that contradict each other.
        """
        settings = self.settings(options)
        read = read_prompts(prompts, self.tokenizer, attention_mask)
        if streamer is not None:
            self._refuse_streamer(settings, len(read.ids))
        session = self.session()
        session.start(read.ids, room=settings.max_new_tokens)
        stops = self.stops(settings)
        if settings.num_beams > 1:
            done = search_beams(session, settings, stops)
        else:
            done = generate_rows(session, settings, stops, streamer)
        return done[0] if read.is_one and len(done) == 1 else done

    def conversation(self, system: str | None = None) -> Conversation:
        """A conversation, or a text that grows, whose cache is kept between its parts.

        Args:
            system: what stands in front of a chat as the system's message.
        """
        return Conversation(self, system)

    def session(self) -> Session:
        """Rows of tokens over a new cache."""
        pad = self.record.pad if self.record.pad is not None else 0
        return Session(
            self._make_runner(), context_length=self.record.context_length,
            vocab_size=self.record.vocab_size, pad=pad,
        )  # fmt: skip

    def settings(self, options: Mapping[str, Any]) -> Settings:
        """Options of a call, completed by the model's own defaults."""
        return resolve(options, self.defaults)

    def stops(self, settings: Settings) -> Stops:
        """What ends a sequence: the model's stop tokens, and those of the settings."""
        texts = tuple(stop for stop in settings.stop if isinstance(stop, str))
        if "" in texts:
            raise ArgumentError("a stop text is empty")
        if texts and self.tokenizer is None:
            raise ArgumentError(
                "a stop text needs a tokenizer, and the model came without one",
                fix="Give token ids as `stop`.",
            )
        ids = {stop for stop in settings.stop if isinstance(stop, int)} | set(self.record.eos)
        plain = []
        for text in texts:  # a special token is no part of the text, and is known by its id
            special = self.tokenizer.special_id(text) if self.tokenizer else None
            ids |= set() if special is None else {special}
            plain += [text] if special is None else []
        return Stops(frozenset(ids), tuple(plain), self.tokenizer)

    def _refuse_streamer(self, settings: Settings, prompts: int) -> None:
        if self.tokenizer is None:
            raise ArgumentError("a streamer gets text, and the model came without a tokenizer")
        if prompts > 1 or settings.num_return_sequences > 1 or settings.num_beams > 1:
            raise ArgumentError(
                "a streamer follows one sequence, and there are several",
                fix="Give one prompt, without beams and num_return_sequences.",
            )
