"""Data of a decoder that looks at an encoder, from data of the encoder alone.

The cross keys and values are those that the original encoder gives, and the tokens are those that
the original model itself generates: what a decoder meets when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from graphwright.ir.data.batches import Batches
from graphwright.ir.data.defaults import started
from graphwright.ir.generation.encoder_decoder import EncoderDecoder
from graphwright.ir.parts import Parts

TOKENS = 16
"""Generated tokens per source; the end of a text is no stop, so that all rows have as many."""


def decoder_data(parts: Parts, sources: Batches, tokens: int = TOKENS) -> Batches:
    """Batches for the decoder of two parts.

    Args:
        parts: an encoder and a decoder, as they were traced.
        sources: for the encoder.
        tokens: of every row, behind the start token.
    """
    model = EncoderDecoder.of(parts)
    limit = model.record.context_length
    count = tokens if limit is None else min(tokens, limit - 1)
    start = model.record.decoder_start or 0
    whole = parts[list(parts)[-1]].signature
    own = started(whole)

    def read() -> Iterator[dict[str, Tensor]]:
        for batch in sources:
            ids = model.continued(batch, [start], count)
            given = {model.record.ids: ids, **model.encode(batch)}
            yield {spec.name: given[spec.name] for spec in own.inputs}

    made: list[dict[str, Tensor]] = []

    def once() -> list[dict[str, Tensor]]:
        made[:] = made or list(read())
        return made

    return Batches(sources.source, own, once, program=whole)
