"""Artifacts in EleutherAI's lm-evaluation-harness, as its model `graphwright`.

    python -m graphwright.lm_eval --model_args path=out --tasks hellaswag

is the harness's own command, its model named; from Python, importing this module makes the name
known, or `lm_eval.simple_evaluate(GraphwrightLM("out"), tasks=[...])`. The harness is a package of
its own (`pip install lm_eval`) that nothing else here needs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphwright.backends.base import Compiled
from graphwright.backends.opening import open_artifact
from graphwright.evaluation.scoring import scorer_of
from graphwright.evaluation.texts import likelihoods
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.language_model import LanguageModel
from graphwright.ir.generation.text import Tokenizer

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ArgumentError("graphwright.lm_eval needs lm_eval", fix="pip install lm_eval") from error

OPTIONS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams",
)  # fmt: skip
"""Options of generation that tasks may give, named as those of `generate`."""

MOST_TOKENS = 256
"""Tokens that a task gets that asks for no number, as everywhere in the harness."""


@register_model("graphwright")
class GraphwrightLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A compiled decoder with its tokenizer.

    Requests that are longer than the model's context lose their beginning, as with the harness's
    own models.

    Args:
        path: folder of an artifact, or its model file.
        batch_size: texts that are run together.
        max_length: tokens of a text at most; the model's context when absent.

    Raises:
        ArgumentError: there is no artifact that generates, or it has no tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int | str = 8,
        max_length: int | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        compiled: Compiled | None = open_artifact(Path(path)) if Path(path).exists() else None
        if compiled is None:
            raise ArgumentError("this is no artifact", where=str(path))
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ArgumentError(f"batch_size is {batch_size!r}, and has to be a number")
        self.language_model: LanguageModel = compiled.language_model
        if self.language_model.tokenizer is None:
            raise ArgumentError("the artifact came without a tokenizer", where=str(path))
        self.tokenizer: Tokenizer = self.language_model.tokenizer
        self.batch_size = int(batch_size)
        self.max_length = max_length or self.language_model.record.context_length or 2048
        self._compiled, self._scorer = compiled, scorer_of(compiled)

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        eos = self.language_model.record.eos
        if not eos:
            raise ArgumentError("the model has no token that ends texts")
        return eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has nothing in front of it."""
        bos = self.language_model.record.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return str(self.tokenizer.folder)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """Token ids; with special tokens unless they are declined, or in the text already."""
        if add_special_tokens is None:
            bos = self.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer.encode(string, special=add_special_tokens)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            ArgumentError: the model has no chat template, or an answer is begun already.
        """
        if not add_generation_prompt:
            raise ArgumentError("an answer that is begun already is not supported")
        template = self.tokenizer.template
        if template is None:
            raise ArgumentError("this model has no chat template", where=self.tokenizer_name)
        return template.render(chat_history)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, own) for _, context, own in requests]
        with torch.inference_mode():
            found = likelihoods(self._scorer, self._compiled.signature, pairs, self.batch_size)
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def _cut(self, context: list[int], own: list[int]) -> tuple[list[int], list[int]]:
        """The end of a text that fits; one token in front of the continuation stays.

        The last token is not run, so that one more than the context fits.
        """
        room = self.max_length + 1 - len(own)
        if room < 1:
            raise ArgumentError(
                f"a continuation has {len(own)} tokens, and the context {self.max_length}"
            )
        return context[-room:], own

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts behind prompts, up to what ends them."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for same in groups.values():
            options = self._options(requests[same[0]].args[1])
            most = self.max_length - options["max_new_tokens"]
            for start in range(0, len(same), self.batch_size):
                piece = same[start : start + self.batch_size]
                prompts = [self.tok_encode(requests[i].args[0])[-most:] for i in piece]
                done = self.language_model.generate(prompts, **options)
                done = done if isinstance(done, list) else [done]
                texts |= {i: one.text or "" for i, one in zip(piece, done, strict=True)}
        return [texts[index] for index in range(len(requests))]

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `generate` for a task's."""
        asked = dict(given)
        until = asked.pop("until", None) or []
        most = asked.pop("max_gen_toks", MOST_TOKENS)
        unknown = sorted(set(asked) - set(OPTIONS))
        if unknown:
            raise ArgumentError(f"a task asks for {unknown}, which `generate` does not know")
        if not asked.get("do_sample", asked.get("temperature", 0) > 0):
            asked = {k: v for k, v in asked.items() if k in ("repetition_penalty", "num_beams")}
            asked["do_sample"] = False
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return {**asked, "stop": tuple(stop), "max_new_tokens": most}


def main() -> None:
    """The harness's own command, with this model unless another is named."""
    from lm_eval.__main__ import cli_evaluate

    if not any(argument.split("=")[0] in ("--model", "-M") for argument in sys.argv):
        sys.argv += ["--model", "graphwright"]
    cli_evaluate()


if __name__ == "__main__":
    main()
