"""`generate` over an encoder and a decoder that looks at it: translation, summaries, speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.decode import Completion, generate_rows, search_beams
from graphwright.ir.generation.language_model import LanguageModel
from graphwright.ir.generation.prompts import read_prompts
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.session import Session
from graphwright.ir.generation.stops import Stops
from graphwright.ir.parts import Parts
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature


class Runs(Protocol):
    """A program or an artifact: one tensor per input in, flat outputs out."""

    @property
    def signature(self) -> Signature: ...

    def run_flat(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...


class EncoderDecoder(LanguageModel):
    """Two parts that generate together.

    Attributes:
        record: of the decoder. source: of the encoder.
    """

    def __init__(
        self, encoder: Runs, decoder: Runs, records: tuple[Generation, Generation],
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.source, record = records
        self._encoder, self._decoder = encoder, decoder
        super().__init__(record, self._runner, folder)

    @classmethod
    def of(cls, parts: Parts) -> EncoderDecoder:
        """Over programs, as tracing made them.

        Raises:
            ArgumentError: they are no encoder and decoder.
        """
        found = {name: Generation.of(program) for name, program in parts.items()}
        halves = [(parts[n], r) for n, r in found.items() if r is not None and r.kind != "decoder"]
        if [record.kind for _, record in halves] != ["encoder", "cross_decoder"]:
            raise ArgumentError(f"the parts {list(parts)} are no encoder and decoder")
        (encoder, source), (decoder, record) = halves
        folder = Path(record.tokenizer) if record.tokenizer else None
        return cls(_OfProgram(encoder), _OfProgram(decoder), (source, record), folder)

    def generate(
        self,
        prompts: Any,
        *,
        attention_mask: Tensor | None = None,
        streamer: Callable[[str], None] | None = None,
        begin: Sequence[int] | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Generates what belongs to each source.

        Args:
            prompts: what the encoder reads: a text, token ids, or a list of such; of an encoder of
                features, a tensor [batch, ...] of them.
            attention_mask: of a tensor [batch, tokens] of ids: 0 on padding, at any side.
            streamer: gets the text of the one sequence, piece by piece.
            begin: tokens that every sequence begins with, as those that name a language and a
                task; the model's start token when None. They are no part of what is returned.
            options: as for `LanguageModel.generate`.

        Raises:
            ArgumentError: a source of another form, no start token, or options that contradict
                each other.
        """
        settings = self.settings(options)
        given, is_one = self._sources(prompts, attention_mask)
        rows = len(next(iter(given.values())))
        if begin is None:
            begin = [] if self.record.decoder_start is None else [self.record.decoder_start]
        if not begin:
            raise ArgumentError(
                "the model says no token to begin with", fix="Give `begin=[token, ...]`."
            )
        if streamer is not None:
            self._refuse_streamer(settings, rows)
        session = self._session(given, begin, settings.max_new_tokens)
        stops = self.stops(settings)
        if settings.num_beams > 1:
            done = search_beams(session, settings, stops)
        else:
            done = generate_rows(session, settings, stops, streamer)
        return done[0] if is_one and len(done) == 1 else done

    def continued(self, given: dict[str, Tensor], begin: Sequence[int], tokens: int) -> Tensor:
        """The most probable `tokens` tokens behind `begin` for each source, whatever ends a text.

        Args:
            given: the encoder's inputs by name, a row per source.

        Returns:
            int64 [sources, len(begin) + tokens], `begin` in front.
        """
        greedy = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
        session = self._session(given, begin, tokens)
        generate_rows(session, self.settings(greedy), Stops(frozenset(), (), None))
        return torch.tensor(session.tokens)

    def _session(self, given: dict[str, Tensor], begin: Sequence[int], room: int) -> Session:
        """Rows that look at what the encoder gives, which runs once."""
        session = self.session()
        runner = session.runner
        assert isinstance(runner, ConcatRunner)
        runner.hold(self.encode(given))
        session.start([list(begin)] * len(next(iter(given.values()))), room=room)
        return session

    def encode(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What every step of the decoder reads of the encoder: one run of it.

        Args:
            given: the encoder's inputs by name, a row per source.
        """
        specs = self._encoder.signature.inputs
        inputs = tuple(given[spec.name].to(getattr(torch, spec.dtype)) for spec in specs)
        names = [spec.name for spec in self._encoder.signature.outputs]
        outputs = dict(zip(names, self._encoder.run_flat(inputs), strict=True))
        wanted = {spec.name for spec in self._decoder.signature.inputs}
        held = {name: value for name, value in outputs.items() if name in wanted}
        if self.record.cross_mask is not None:
            assert self.source.mask is not None
            held[self.record.cross_mask] = given[self.source.mask]
        return held

    def _sources(self, prompts: Any, mask: Tensor | None) -> tuple[dict[str, Tensor], bool]:
        """The encoder's inputs, and whether one source was given and no list."""
        name, has_mask = self.source.ids, self.source.mask is not None
        if isinstance(prompts, Tensor) and prompts.is_floating_point():
            if has_mask:
                raise ArgumentError(f"the encoder reads {name}: token ids, not numbers")
            shape = next(s.shape for s in self._encoder.signature.inputs if s.name == name)
            is_one = prompts.dim() == len(shape) - 1
            return {name: prompts.unsqueeze(0) if is_one else prompts}, is_one
        if not has_mask:
            raise ArgumentError(f"the encoder reads {name}: a tensor of features, not texts")
        read = read_prompts(prompts, self.tokenizer, mask)
        longest = max(map(len, read.ids))
        pad = self.record.pad or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in read.ids])
        lengths = torch.tensor([len(row) for row in read.ids])
        seen = (torch.arange(longest) < lengths[:, None]).long()
        assert self.source.mask is not None
        return {name: ids, self.source.mask: seen}, read.is_one

    def _runner(self) -> ConcatRunner:
        return ConcatRunner(self.record, self._decoder.signature, self._decoder.run_flat)


class _OfProgram:
    """A program as `Runs`."""

    def __init__(self, program: Program) -> None:
        self.signature = program.signature
        self._module = program.running

    def run_flat(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(self._module(*inputs))
