"""How tokens are chosen: the options of generation, and an artifact's own defaults for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.constraints import Constraints
from graphwright.ir.options import Rule

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Options that have a part in sampling alone."""

_ANY_SAMPLING = f"any([name in given for name in {list(SAMPLING)}])"


class Settings(Constraints):
    """Options of `generate`, named and meant as those of transformers."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("do_sample", f"do_sample != False or not {_ANY_SAMPLING}",
             "do_sample is false, and temperature, top_k, top_p and min_p only act on samples"),
        Rule("num_beams", f"num_beams == 1 or not (do_sample or {_ANY_SAMPLING})",
             "beam search takes the most probable sequences and does not sample"),
        Rule("num_return_sequences", "num_beams == 1 or num_return_sequences <= num_beams",
             "num_return_sequences is {num_return_sequences}, and there are {num_beams} beams"),
        Rule("length_penalty", "num_beams > 1 or 'length_penalty' not in given",
             "length_penalty compares beams, and num_beams is 1"),
        Rule("early_stopping", "num_beams > 1 or 'early_stopping' not in given",
             "early_stopping ends beam search, and num_beams is 1"),
    )  # fmt: skip

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Tokens to generate at most. When it is not given, fewer where the context has room for fewer;
    when it is, that is an error."""

    stop: tuple[str | int, ...] = ()
    """Texts and token ids that end a sequence, beside the model's own stop tokens. The text of a
    completion ends in front of a stop text."""

    do_sample: bool | None = None
    """Whether tokens are drawn at random; when absent, they are where a sampling option is given
    or the model's own defaults say so. Else the most probable token is taken."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 takes the most probable token."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Draws from the k most probable tokens; 0 is no limit."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws from the smallest set of tokens whose probabilities sum to this."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leaves out tokens less probable than this share of the most probable one."""

    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are there already."""

    num_beams: Annotated[int, Field(ge=1)] = 1
    """Sequences that beam search follows; 1 is no beam search."""

    length_penalty: float = 1.0
    """Beams are compared by log-probability / length ** length_penalty."""

    early_stopping: bool = False
    """Ends beam search once there are `num_beams` finished sequences, and not only when no other
    could become better."""

    num_return_sequences: Annotated[int, Field(ge=1)] = 1
    """Sequences per prompt."""

    seed: int = 0
    """Of the random numbers of sampling: every sequence has a stream of its own."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random; only of what `resolve` returned."""
        return bool(self.do_sample)


_MEANT = {
    "do_sample", *SAMPLING, "repetition_penalty", "num_beams", "length_penalty", "early_stopping",
    *Constraints.model_fields,
}  # fmt: skip
"""Keys of generation_config.json that are defaults of ours."""


def resolve(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Settings:
    """The settings of a call: the given options, and the model's own defaults for the others.

    Args:
        given: options by name; None stands for one that is not given.
        defaults: of generation_config.json.

    Raises:
        ArgumentError: an unknown option, one of another type or out of range, or options that
            contradict each other.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if isinstance(asked.get("stop"), str | int):
        asked["stop"] = (asked["stop"],)
    settings = _checked(asked)
    own = {n: v for n, v in defaults.items() if n in _MEANT and v is not None and n not in asked}
    if own.get("early_stopping") == "never":
        del own["early_stopping"]
    if settings.do_sample is None:
        draws = any(name in asked for name in SAMPLING)
        if not draws and "num_beams" not in asked:
            draws = bool(own.get("do_sample", False))
        asked["do_sample"] = draws
    if asked.get("temperature") == 0.0:
        asked = {n: v for n, v in asked.items() if n not in SAMPLING}
        asked["do_sample"] = False
    unmeant = ("num_beams",) if asked["do_sample"] else SAMPLING
    if asked["do_sample"] or asked.get("num_beams", own.get("num_beams", 1)) == 1:
        unmeant = (*unmeant, "length_penalty", "early_stopping")
    kept = {n: v for n, v in own.items() if n not in unmeant and n != "do_sample"}
    settings = _checked({**kept, **asked})
    if settings.num_return_sequences > 1 and settings.num_beams == 1 and not settings.samples:
        raise ArgumentError(
            f"num_return_sequences is {settings.num_return_sequences}, and the most probable "
            "tokens make one sequence",
            fix="Give do_sample=True or num_beams.",
        )
    return settings


def _checked(options: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(options))
    except TypeError as error:
        raise ArgumentError(f"generate: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'][:1]))}: {e['msg']}" for e in error.errors()]
        raise ArgumentError(f"generate: {'; '.join(dict.fromkeys(lines))}") from None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,),
    "force_words_ids": (), "sequence_bias": (), "typical_p": (1.0,), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "top_h": (), "exponential_decay_length_penalty": (), "stop_strings": (),
    "early_stopping": (False, True), "guidance_scale": (1.0,), "num_beam_groups": (1,),
    "penalty_alpha": (), "watermarking_config": (), "dola_layers": (),
    "prompt_lookup_num_tokens": (),
}  # fmt: skip
"""Keys of generation_config.json that change the tokens and have no part here, and their values
that change nothing."""


def unmet(defaults: Mapping[str, Any]) -> list[str]:
    """What a model's own defaults ask for and generation here does not do, as `key = value`."""
    return [
        f"{name} = {json.dumps(value)[:80]}"
        for name, value in defaults.items()
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]
    ]
