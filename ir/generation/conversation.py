"""A conversation: tokens that grow turn by turn over a cache that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.decode import Completion, generate_rows
from graphwright.ir.generation.prompts import read_prompts

if TYPE_CHECKING:
    from graphwright.ir.generation.language_model import LanguageModel


class Conversation:
    """Turns of a chat (`say`), or rows of text (`append`, `generate`, `rewind`), on one cache.

    Of every turn only what is new is run; the answer's last token, which was chosen and not run, is
    run with the next turn.

    Attributes:
        messages: of the chat so far, each with `role` and `content`.
        tokens: of every row, all that the model has seen or said.
    """

    def __init__(self, model: LanguageModel, system: str | None) -> None:
        self._model = model
        self._system = system
        self._session = model.session()
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def tokens(self) -> list[list[int]]:
        return self._session.tokens

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = [] if self._system is None else [_message("system", self._system)]
        self._session.tokens = []

    def say(
        self, text: str, *, streamer: Callable[[str], None] | None = None, **options: Any
    ) -> Completion:
        """Says something as the user, and returns the model's answer.

        What of the conversation the template renders as before is not run again. When something
        fails or is interrupted, the conversation is as it was before.

        Args:
            text: of the user's message.
            streamer: gets the answer piece by piece.
            options: as of `generate`.

        Raises:
            ArgumentError: a model without chat template or tokenizer, or a conversation that is
                longer than the context.
        """
        asked = [*self.messages, _message("user", text)]
        ids = read_prompts(asked, self._model.tokenizer).ids
        self._put(ids)
        (answer,) = self._generated(streamer, options)
        self.messages = [*asked, _message("assistant", answer.text or "")]
        return answer

    def append(self, prompts: Any) -> None:
        """Puts texts or token ids behind the rows; the first call says how many rows there are.

        Args:
            prompts: one text or list of token ids, or a list of such with one for each row.

        Raises:
            ArgumentError: of another number than there are rows, or longer than the context.
        """
        self._refuse_chat("append")
        read = read_prompts(prompts, self._model.tokenizer)
        if not self.tokens:
            self._session.start(read.ids, room=0)
            return
        if len(read.ids) != len(self.tokens):
            raise ArgumentError(
                f"the cache holds {len(self.tokens)} rows, and {len(read.ids)} prompts were given",
                fix="Give one for each row, or begin another conversation.",
            )
        for row, ids in enumerate(read.ids):
            self._session.append(row, ids)

    def generate(
        self, *, streamer: Callable[[str], None] | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """Generates behind the rows, and keeps what was generated.

        Returns:
            A completion for one row, a list for several.
        """
        if not self.tokens:
            raise ArgumentError("there is nothing to go on from", fix="Call `append` first.")
        done = self._generated(streamer, options)
        return done[0] if len(done) == 1 else done

    def rewind(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row.

        Raises:
            ArgumentError: a row has no more than that.
        """
        self._refuse_chat("rewind")
        if not 0 <= tokens < min(map(len, self.tokens), default=0):
            raise ArgumentError(
                f"cannot forget {tokens} tokens: the rows have {list(map(len, self.tokens))}"
            )
        for row, held in enumerate(self.tokens):
            self._session.rewind(row, len(held) - tokens)

    def _generated(
        self, streamer: Callable[[str], None] | None, options: dict[str, Any]
    ) -> list[Completion]:
        settings = self._model.settings(options)
        if settings.num_beams > 1 or settings.num_return_sequences > 1:
            raise ArgumentError(
                "a conversation goes on with one sequence per row, not with beams",
                fix="Leave num_beams and num_return_sequences out, or use `generate`.",
            )
        if streamer is not None and len(self.tokens) > 1:
            raise ArgumentError("a streamer follows one sequence, and there are several rows")
        return generate_rows(self._session, settings, self._model.stops(settings), streamer)

    def _put(self, ids: list[list[int]]) -> None:
        if self.tokens:
            self._session.replace(0, ids[0])
        else:
            self._session.start(ids, room=0)

    def _refuse_chat(self, what: str) -> None:
        if len(self.messages) > (self._system is not None):
            raise ArgumentError(f"a chat takes `say`; `{what}` is for texts and token ids")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
