"""What ends a sequence, and its text as it becomes known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphwright.ir.generation.text import TextStream, Tokenizer


@dataclass(frozen=True)
class Stops:
    """What ends a sequence.

    Attributes:
        ids: stop tokens.
        texts: stop texts; they need a tokenizer.
        tokenizer: of the model, where it has one.
    """

    ids: frozenset[int]
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    def end(self, ids: Sequence[int]) -> bool:
        """Whether generated tokens are at a stop token or hold a stop text."""
        if ids and ids[-1] in self.ids:
            return True
        if not self.texts or self.tokenizer is None:
            return False
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in self.texts)

    def cut(self, text: str) -> str:
        """A text up to the first stop text in it."""
        places = [text.find(stop) for stop in self.texts if stop in text]
        return text[: min(places)] if places else text

    def held_back(self, text: str) -> int:
        """Characters at a text's end that may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self.texts), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.texts):
                return size
        return 0


class Writer:
    """Gives a sequence's text out as it becomes known, and never a part of a stop text."""

    def __init__(self, stream: TextStream, stops: Stops, put: Callable[[str], None] | None) -> None:
        self._stream, self._stops, self._put = stream, stops, put
        self._text, self._given = "", 0

    def add(self, token: int) -> bool:
        """Takes a token; whether the text has come to a stop text."""
        self._text += self._stream.put(token)
        cut = self._stops.cut(self._text)
        if is_stop := cut != self._text:
            self._give(cut)
        else:
            self._give(cut[: len(cut) - self._stops.held_back(cut)])
        return is_stop

    def close(self) -> str:
        """Gives the rest out; returns the whole text."""
        text = self._stops.cut(self._text + self._stream.rest())
        self._give(text)
        return text

    def _give(self, text: str) -> None:
        if self._put is not None and len(text) > self._given:
            self._put(text[self._given :])
        self._given = max(self._given, len(text))
