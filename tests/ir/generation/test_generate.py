"""The driver against transformers' own generation, over a runner that has no cache to err in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models.whole_sequence import WholeSequence

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.decode import Completion
from graphwright.ir.generation.language_model import LanguageModel
from graphwright.ir.generation.record import Generation

transformers = pytest.importorskip("transformers")

CONTEXT = 64
VOCABULARY = 48
PROMPTS = [[5, 9, 11, 7], [3], [17, 4, 4, 30, 21, 8, 2]]


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def model_of(net: Any, eos: Sequence[int] = (), runners: list[Any] | None = None) -> LanguageModel:
    record = Generation(
        kind="decoder", context_length=CONTEXT, vocab_size=VOCABULARY, eos=tuple(eos), pad=0
    )

    def make() -> WholeSequence:
        runner = WholeSequence(net)
        if runners is not None:
            runners.append(runner)
        return runner

    return LanguageModel(record, make, None)


def theirs(net: Any, prompt: list[int], new: int = 12, **options: Any) -> list[list[int]]:
    ids = torch.tensor([prompt])
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    return [row[len(prompt) :].tolist() for row in out]


def ids_of(done: Any) -> list[list[int]]:
    return [c.ids for c in ([done] if isinstance(done, Completion) else done)]


def without_pad(ids: list[int], eos: Sequence[int]) -> list[int]:
    """Tokens up to the first stop token, that one too."""
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    return ids[:end]


def test_greedy_tokens_alone_and_in_a_ragged_batch(net: Any) -> None:
    model = model_of(net)
    expected = [theirs(net, prompt, do_sample=False)[0] for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == 3
    assert [ids_of(model.generate(p, max_new_tokens=12))[0] for p in PROMPTS] == expected
    assert ids_of(model.generate(PROMPTS, max_new_tokens=12)) == expected


def test_padding_of_a_tensor_may_lie_on_any_side(net: Any) -> None:
    model = model_of(net)
    expected = ids_of(model.generate(PROMPTS[:2], max_new_tokens=5))
    left = torch.tensor([PROMPTS[0], [0, 0, 0, 3]])
    right = torch.tensor([PROMPTS[0], [3, 0, 0, 0]])
    for ids in (left, right):
        mask = (ids != 0).long()
        assert ids_of(model.generate(ids, attention_mask=mask, max_new_tokens=5)) == expected


def test_each_of_several_stop_tokens_ends_its_row(net: Any) -> None:
    free = ids_of(model_of(net).generate(PROMPTS, max_new_tokens=12))
    eos = [free[0][3], free[2][0]]
    runners: list[Any] = []
    done = model_of(net, eos, runners).generate(PROMPTS, max_new_tokens=12)
    assert ids_of(done) == [without_pad(ids, eos) for ids in free]
    assert done[2].finish == "stop"
    assert len(done[2].ids) == 1
    # a row that has ended is not run any more
    assert runners[0].ran[1][2] == 0


def test_a_stop_token_of_the_call(net: Any) -> None:
    free = ids_of(model_of(net).generate(PROMPTS[0], max_new_tokens=12))[0]
    done = model_of(net).generate(PROMPTS[0], max_new_tokens=12, stop=free[2])
    assert isinstance(done, Completion)
    assert (done.ids, done.finish) == (free[:3], "stop")


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("with_eos", [False, True])
def test_beams_are_transformers(net: Any, penalty: float, with_eos: bool) -> None:
    eos = [theirs(net, p, do_sample=False)[0][4] for p in PROMPTS[:2]] if with_eos else []
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": penalty}
    expected = [
        without_pad(ids, eos)
        for prompt in PROMPTS
        for ids in theirs(net, prompt, do_sample=False, eos_token_id=eos or None, **options)
    ]
    done = model_of(net, eos).generate(PROMPTS, max_new_tokens=12, **options)
    assert ids_of(done) == expected
    assert [c.score for c in done[:2]] == sorted((c.score for c in done[:2]), reverse=True)


def test_the_repetition_penalty_counts_the_prompt(net: Any) -> None:
    expected = theirs(net, PROMPTS[2], do_sample=False, repetition_penalty=1.7)
    assert expected != theirs(net, PROMPTS[2], do_sample=False)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.7}
    assert ids_of(model_of(net).generate(PROMPTS[2], **options)) == expected
    beams = theirs(net, PROMPTS[2], do_sample=False, repetition_penalty=1.7, num_beams=2)
    assert ids_of(model_of(net).generate(PROMPTS[2], **options, num_beams=2)) == beams


def test_samples_depend_on_the_seed_and_not_on_the_batch(net: Any) -> None:
    model = model_of(net)
    options = {"max_new_tokens": 10, "temperature": 1.5, "num_return_sequences": 3}
    first = ids_of(model.generate(PROMPTS[0], seed=1, **options))
    assert first == ids_of(model.generate(PROMPTS[0], seed=1, **options))
    assert first != ids_of(model.generate(PROMPTS[0], seed=2, **options))
    assert len(set(map(tuple, first))) == 3
    assert ids_of(model.generate([PROMPTS[0], PROMPTS[1]], seed=1, **options))[:3] == first


def test_the_cache_goes_on_and_runs_only_what_is_new(net: Any) -> None:
    runners: list[Any] = []
    talk = model_of(net, runners=runners).conversation()
    talk.append([PROMPTS[0], PROMPTS[2]])
    first = ids_of(talk.generate(max_new_tokens=4))
    talk.append([[6, 6], [13]])
    second = ids_of(talk.generate(max_new_tokens=4))
    whole = [[*PROMPTS[0], *first[0], 6, 6], [*PROMPTS[2], *first[1], 13]]
    assert second == [theirs(net, ids, 4, do_sample=False)[0] for ids in whole]
    # the last token of the first answer, which was chosen and not run, goes first
    assert runners[0].ran[4] == [3, 2]
    talk.rewind(6)
    again = ids_of(talk.generate(max_new_tokens=3))
    assert again[1] == theirs(net, whole[1][:-2], 3, do_sample=False)[0]


def test_the_buffer_grows_up_to_the_context(net: Any) -> None:
    runners: list[Any] = []
    model = model_of(net, runners=runners)
    done = model.generate(PROMPTS[0])
    assert isinstance(done, Completion)
    assert (len(done.ids), done.finish) == (CONTEXT - len(PROMPTS[0]), "length")
    assert runners[0].capacity == CONTEXT
    prompt = [1] * (CONTEXT - 1)
    assert len(ids_of(model.generate(prompt))[0]) == 1
    with pytest.raises(ArgumentError, match=r"63 tokens and 2 new ones .* length, 64"):
        model.generate(prompt, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="65 tokens are more than the model's context length"):
        model.generate([1] * (CONTEXT + 1))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("hello", {}, "without a tokenizer"),
        ([[5], []], {}, "not an empty list"),
        ([VOCABULARY], {}, f"token {VOCABULARY} is none of the model's {VOCABULARY}"),
        ([5], {"temprature": 1.0}, "temprature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"do_sample": False, "top_k": 3}, "only act on samples"),
        ([5], {"num_beams": 2, "top_k": 3}, "does not sample"),
        ([5], {"num_return_sequences": 2}, "make one sequence"),
        ([5], {"stop": "x"}, "a stop text needs a tokenizer"),
        ([5], {"streamer": print}, "a streamer gets text"),
        (torch.ones(2, 2), {}, "token ids are whole numbers"),
    ],
)
def test_what_cannot_be_done_is_refused(
    net: Any, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        model_of(net).generate(prompt, **options)


def test_a_batch_of_another_size_is_refused(net: Any) -> None:
    talk = model_of(net).conversation()
    talk.append([[5], [6]])
    with pytest.raises(ArgumentError, match="holds 2 rows, and 3 prompts were given"):
        talk.append([[5], [6], [7]])


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [30, 8]], "suppress_tokens": [9, 11]},
        {"min_new_tokens": 9},
        {"min_length": 14},
        {"forced_eos_token_id": 5},
        {"begin_suppress_tokens": [40, 3, 12, 22]},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "forced_eos_token_id": 5},
    ],
)
def test_constraints_are_transformers(net: Any, options: dict[str, Any]) -> None:
    # a prompt that repeats itself, and one that comes to a stop token
    prompts = [[5, 9, 11, 7, 5, 9], PROMPTS[2]]
    eos = [theirs(net, PROMPTS[2], do_sample=False)[0][6]]
    expected = [
        without_pad(theirs(net, p, do_sample=False, eos_token_id=eos, **options)[0], eos)
        for p in prompts
    ]
    model = model_of(net, eos)
    assert ids_of(model.generate(prompts, max_new_tokens=12, **options)) == expected
    width = options.get("num_beams", 1)
    free = ids_of(model.generate(prompts, max_new_tokens=12, num_beams=width))
    assert free != expected or "early_stopping" in options


def test_the_token_behind_the_start_may_be_forced(net: Any) -> None:
    options = {"forced_bos_token_id": 9, "begin_suppress_tokens": [9, 41]}
    expected = theirs(net, [3], do_sample=False, **options)
    assert ids_of(model_of(net).generate([3], max_new_tokens=12, **options)) == expected
