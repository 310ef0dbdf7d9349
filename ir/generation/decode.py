"""The loops that make tokens: run what is pending, choose, look whether a sequence ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.beams import Beams
from graphwright.ir.generation.constraints import constrain, is_free
from graphwright.ir.generation.sampling import choose, penalize, refuse_broken, streams_of
from graphwright.ir.generation.session import Session
from graphwright.ir.generation.settings import Settings
from graphwright.ir.generation.stops import Stops, Writer


@dataclass
class Completion:
    """What a model generated for one prompt.

    Attributes:
        ids: generated tokens, the stop token included.
        text: their text without special tokens, up to a stop text; None without a tokenizer.
        finish: `stop` at a stop token or text, `length` at `max_new_tokens` or a full context.
        prompt_tokens: tokens in front of it.
        run_tokens: of these, those that were not in the cache already.
        first_seconds: from the start to the first token, of the whole batch.
        seconds: from the start to the last one.
        score: log-probability / length ** length_penalty, of beam search alone.
    """

    prompt_tokens: int
    run_tokens: int
    ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish: Literal["stop", "length"] | None = None
    first_seconds: float = 0.0
    seconds: float = 0.0
    score: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed behind the first token; None where there is no second one."""
        after = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / after if len(self.ids) > 1 and after > 0 else None

    def __str__(self) -> str:
        return str(self.ids) if self.text is None else self.text


def generate_rows(
    session: Session,
    settings: Settings,
    stops: Stops,
    put: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Generates behind every row of a session: the most probable tokens, or samples.

    The session's rows hold the tokens afterwards, the last one of each pending.

    Args:
        session: its rows are the prompts.
        settings: how to choose.
        stops: what ends a sequence.
        put: gets the text of the one sequence as it becomes known.
    """
    start = time.perf_counter()
    limit = new_tokens(session, settings)
    count = settings.num_return_sequences
    done = _completions(session)
    if count > 1:
        logits = session.logits(range(len(done))).repeat_interleave(count, dim=0)
        session.reorder([row for row in range(len(done)) for _ in range(count)])
        done = [Completion(c.prompt_tokens, c.run_tokens) for c in done for _ in range(count)]
    else:
        logits = session.logits(range(len(done)))
    streams = streams_of(settings.seed, len(done)) if settings.samples else []
    tokenizer = stops.tokenizer
    writers = [Writer(tokenizer.stream(), stops, put) for _ in done] if tokenizer else []
    active = list(range(len(done)))
    while True:
        refuse_broken(logits, active)
        held = [session.tokens[row] for row in active]
        scores = _processed(logits[active], held, settings, stops, limit, len(done[active[0]].ids))
        chosen = choose(scores, settings, [streams[row] for row in active] if streams else [])
        for row, token in zip(active, chosen, strict=True):
            session.tokens[row].append(token)
            _take(done[row], token, stops, limit, writers[row] if writers else None)
            done[row].seconds = time.perf_counter() - start
            if len(done[row].ids) == 1:
                done[row].first_seconds = done[row].seconds
        active = [row for row in active if done[row].finish is None]
        if not active:
            break
        logits = session.logits(active)
    for completion, writer in zip(done, writers, strict=False):
        completion.text = writer.close()
    return done


def _processed(
    scores: torch.Tensor, tokens: Sequence[Sequence[int]], settings: Settings, stops: Stops,
    limit: int, new: int,
) -> torch.Tensor:  # fmt: skip
    """Scores after the repetition penalty and the constraints."""
    scores = penalize(scores, tokens, settings.repetition_penalty)
    if is_free(settings):
        return scores
    ids = sorted(stops.ids)
    return constrain(scores, tokens, settings, new=new, limit=limit, stops=ids)


def _take(
    completion: Completion, token: int, stops: Stops, limit: int, writer: Writer | None
) -> None:
    """Puts a token into a completion, and says whether that ends it."""
    completion.ids.append(token)
    is_stop = writer.add(token) if writer else False
    if is_stop or token in stops.ids:
        completion.finish = "stop"
    elif len(completion.ids) >= limit:
        completion.finish = "length"


def search_beams(session: Session, settings: Settings, stops: Stops) -> list[Completion]:
    """Generates behind every row of a session by beam search; the best sequences of each.

    The session's cache is used up: it holds beams afterwards.
    """
    start = time.perf_counter()
    limit = new_tokens(session, settings)
    width = settings.num_beams
    prompts = [list(tokens) for tokens in session.tokens]
    done = _completions(session)
    searches = [
        Beams(width, len(stops.ids), settings.length_penalty, settings.early_stopping)
        for _ in prompts
    ]
    logits = session.logits(range(len(prompts))).repeat_interleave(width, dim=0)
    session.reorder([row for row in range(len(prompts)) for _ in range(width)])
    first = 0.0

    def ends(ids: Sequence[int]) -> bool:
        return len(ids) >= limit or stops.end(ids)

    while True:
        active = [at for at, search in enumerate(searches) if not search.is_done]
        rows = [at * width + beam for at in active for beam in range(width)]
        refuse_broken(logits, rows)
        scores = torch.log_softmax(logits, dim=-1)
        generated = len(searches[active[0]].sequences[0])
        scores = _processed(scores, session.tokens, settings, stops, limit, generated)
        order = list(range(len(session.tokens)))
        new: dict[int, int] = {}
        for at in active:
            span = range(at * width, (at + 1) * width)
            parents, tokens = searches[at].advance(scores[span.start : span.stop], ends)
            order[span.start : span.stop] = [span.start + parent for parent in parents]
            new |= dict(zip(span, tokens, strict=True))
        first = first or time.perf_counter() - start
        if all(search.is_done for search in searches):
            break
        session.reorder(order)
        for row, token in new.items():
            session.tokens[row].append(token)
        running = [at for at, search in enumerate(searches) if not search.is_done]
        logits = session.logits([at * width + beam for at in running for beam in range(width)])
    seconds = time.perf_counter() - start
    return [
        _found(completion, score, ids, stops, (first, seconds))
        for completion, search in zip(done, searches, strict=True)
        for score, ids in search.finished[: settings.num_return_sequences]
    ]


def _found(
    prompt: Completion, score: float, ids: list[int], stops: Stops, times: tuple[float, float]
) -> Completion:
    text = stops.cut(stops.tokenizer.decode(ids)) if stops.tokenizer else None
    return Completion(
        prompt.prompt_tokens, prompt.run_tokens, ids, text, "stop" if stops.end(ids) else "length",
        *times, score,
    )  # fmt: skip


def _completions(session: Session) -> list[Completion]:
    return [
        Completion(len(tokens), max(1, len(session.pending(row))))
        for row, tokens in enumerate(session.tokens)
    ]


def new_tokens(session: Session, settings: Settings) -> int:
    """How many tokens may be generated behind the rows of a session.

    Raises:
        ArgumentError: none, or fewer than were asked for.
    """
    room = session.room()
    if room is None:
        return settings.max_new_tokens
    longest = max(map(len, session.tokens))
    is_asked = "max_new_tokens" in settings.model_fields_set
    if room < 1 or (is_asked and settings.max_new_tokens > room):
        raise ArgumentError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens if is_asked else 1} new "
            f"ones are more than the model's context length, {session.context_length}",
            fix="Shorten the prompt, or lower max_new_tokens.",
        )
    return min(settings.max_new_tokens, room)
