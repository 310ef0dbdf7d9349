"""Perplexity, agreement and multiple choice against transformers in float64."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import cached

import graphwright as gw
from graphwright.evaluation.agreement import continued
from graphwright.evaluation.choices import multiple_choice
from graphwright.evaluation.evaluate import evaluate
from graphwright.evaluation.scoring import AtOnce, TokenByToken
from graphwright.evaluation.stage import evaluated
from graphwright.evaluation.texts import padded, text_inputs
from graphwright.ir.data.batches import load_data
from graphwright.ir.data.questions import load_questions
from graphwright.ir.errors import ArgumentError
from graphwright.specs.sections import EvaluateSection


@pytest.fixture(scope="module")
def exact(model: Any) -> Any:
    """The model in float64."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def rounded(program: gw.Program) -> gw.Program:
    """The program in four bits."""
    found: gw.Program = gw.passes.quantize.Rtn(bits=4, block=16)(program)
    return found


def ids_of(folder: Path) -> list[int]:
    return [int(word[1:]) for word in (folder / "text.txt").read_text().split()]


def windowed_perplexity(model: Any, ids: list[int], window: int, stride: int) -> float:
    """The loop that transformers documents, every token counted once, the last window full."""
    total, count, seen = 0.0, 0, 1
    starts = [*range(0, max(0, len(ids) - window), stride), max(0, len(ids) - window)]
    for start in starts:
        piece = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            log = model(piece).logits.log_softmax(-1)[0]
        for at in range(max(seen, start + 1), start + piece.shape[1]):
            total -= float(log[at - start - 1, ids[at]])
            count += 1
        seen = start + piece.shape[1]
    return math.exp(total / count)


class LastLogits:
    """An artifact that gives the logits of last tokens alone."""

    def __init__(self, model: Any) -> None:
        self.model, self.generation = model, cached.record_of(model)
        whole = cached.signature_of(model)
        logits = replace(whole.outputs[0], shape=("batch", 1, model.config.vocab_size))
        self.signature = replace(whole, outputs=(logits, *whole.outputs[1:]))

    def runner(self) -> Any:
        return cached.runner_of(self.model, has_all_logits=False)


@pytest.mark.parametrize("stride", [5, 16])
def test_perplexity_in_windows_is_that_of_transformers_in_float64(
    folder: Path, model: Any, exact: Any, program: gw.Program, stride: int
) -> None:
    section = {"data": "text.txt", "window": 16, "stride": stride, "batch_size": 3}
    data = load_data({**section, "metric": "perplexity"}, program.signature, 0, root=folder)
    found = evaluate(program, LastLogits(model), data, "perplexity")
    expected = windowed_perplexity(exact, ids_of(folder), 16, stride)
    assert found.before == pytest.approx(expected, rel=1e-5)
    assert found.after == pytest.approx(expected, rel=1e-5)
    assert "token by token" in found.what


def test_texts_of_any_lengths_score_the_same_token_by_token(model: Any, program: Any) -> None:
    texts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    ids, lengths = padded(texts)
    inputs = text_inputs(program.signature, ids, lengths)
    labels = ids.where(inputs["attention_mask"] != 0, torch.tensor(-100))
    labels[0, :3] = -100
    at_once = AtOnce(program)(inputs, labels)
    steps = TokenByToken(cached.runner_of(model, has_all_logits=False))(inputs, labels)
    torch.testing.assert_close(steps.log_likelihoods, at_once.log_likelihoods, atol=1e-4, rtol=0)
    assert torch.equal(steps.is_greedy, at_once.is_greedy)
    assert int((at_once.log_likelihoods != 0).sum()) == 4 + 1 + 3


def test_a_program_goes_on_as_transformers_does(model: Any, program: gw.Program) -> None:
    texts = [[5, 6, 7, 8, 9], [12, 13], [14, 15, 16, 17]]
    found, lengths = continued(program, *padded(texts), steps=9)
    assert lengths.tolist() == [14, 11, 13]
    for row, text in enumerate(texts):
        one = torch.tensor([text])
        expected = model.generate(
            one, attention_mask=torch.ones_like(one), do_sample=False, max_new_tokens=9
        )
        assert found[row, : lengths[row]].tolist() == expected[0].tolist()


def test_agreement_is_the_share_of_tokens_that_are_the_originals(
    folder: Path, program: gw.Program, rounded: gw.Program
) -> None:
    data = load_data({"data": "text.txt", "batch_size": 4}, program.signature, 0, root=folder)
    found = evaluate(program, rounded, data, "agreement", steps=11)
    equal = first = 0
    for line in (folder / "text.txt").read_text().splitlines():
        ids = [int(word[1:]) for word in line.split()]
        agreed = []
        for _ in range(11):
            given = {
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids)).long(),
            }
            token, other = (int(p(**given)["logits"][0, -1].argmax()) for p in (program, rounded))
            agreed.append(token == other)
            ids.append(token)
        equal += sum(agreed)
        first += [*agreed, False].index(False)
    assert found.before == 1.0
    assert found.samples == 99
    assert 0 < equal < 99
    assert found.after == equal / 99
    assert found.drop == pytest.approx(1 - equal / 99)
    assert f"first difference {first / 9:.1f} of 11.0 tokens" in found.what


def test_a_spec_says_how_many_steps(folder: Path, program: gw.Program) -> None:
    section = EvaluateSection(data="text.txt", metric="agreement", steps=4)
    data = load_data({"data": "text.txt"}, program.signature, 0, root=folder)
    found = evaluated(section, program, program, data, root=folder, progress=lambda *_: None)
    assert (found["samples"], found["after"]) == (9 * 4, 1.0)


def test_agreement_stops_where_the_context_ends(folder: Path, program: gw.Program) -> None:
    dims = {**program.signature.dims, "seq": gw.ir.signature.DimRange(1, 20)}
    small = replace(program, signature=replace(program.signature, dims=dims))
    data = load_data({"data": "text.txt"}, small.signature, 0, root=folder)
    with pytest.raises(ArgumentError, match="the model's context is 20"):
        evaluate(small, small, data, "agreement")


def test_agreement_needs_to_know_padding(folder: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(61, 8), torch.nn.Linear(8, 61))
    free = {"input_ids": {0: "batch", 1: "seq"}}

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids)  # type: ignore[no-any-return]

    program = gw.trace(Named(), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, dynamic=free)
    data = load_data({"data": "text.txt"}, program.signature, 0, root=folder)
    with pytest.raises(ArgumentError, match="takes no attention_mask"):
        evaluate(program, program, data, "agreement")


@pytest.mark.parametrize("length_normalized", [False, True])
def test_the_likeliest_choice_is_that_of_transformers_in_float64(
    folder: Path, model: Any, exact: Any, program: gw.Program, length_normalized: bool
) -> None:
    questions = load_questions({"data": "questions.jsonl", "batch_size": 4}, root=folder)
    found = multiple_choice(
        program, LastLogits(model), program.signature, questions,
        length_normalized=length_normalized,
    )  # fmt: skip
    right = 0
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        totals = []
        for choice in row["choices"]:
            context, own = (
                [int(w[1:]) for w in text.split()] for text in (row["question"], choice)
            )
            with torch.no_grad():
                log = exact(torch.tensor([context + own])).logits[0].log_softmax(-1)
            total = sum(float(log[len(context) + i - 1, t]) for i, t in enumerate(own))
            totals.append(total / (len(choice) if length_normalized else 1))
        right += totals.index(max(totals)) == row["answer"]
    assert found.before == found.after == right / len(rows)
    assert found.samples == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ('{"question": "w1", "choices": ["w2"], "answer": 0}', "two texts or more"),
        ('{"question": "w1", "choices": ["w2", "w3"], "answer": 2}', "number of a choice, 0 to 1"),
        ('{"question": " ", "choices": ["w2", "w3"], "answer": 0}', "has no tokens"),
    ],
)
def test_a_line_that_is_no_question_is_refused(
    folder: Path, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ArgumentError, match=message) as caught:
        load_questions({"data": "q.jsonl"}, root=tmp_path, tokenizer=folder)
    assert caught.value.where == "q.jsonl, line 1"


def test_other_metrics_do_not_compare_last_logits_with_all(
    folder: Path, model: Any, program: gw.Program
) -> None:
    data = load_data({"data": "text.txt"}, program.signature, 0, root=folder)
    with pytest.raises(ArgumentError, match="cosine compares the logits of all tokens"):
        evaluate(program, LastLogits(model), data, "cosine")


@pytest.mark.parametrize(
    ("lower", "evaluate", "require"),
    [
        (
            "onnxruntime",
            "{data: text.txt, metric: perplexity, window: 16}",
            "{perplexity_ratio: 3}",
        ),
        ("", "{data: questions.jsonl, metric: multiple_choice}", "{max_drop: 0.9}"),
    ],
)
def test_in_a_spec(folder: Path, tmp_path: Path, lower: str, evaluate: str, require: str) -> None:
    spec = folder / "spec.yaml"
    spec.write_text(
        f"version: 1\npasses: [{{quantize.rtn: {{bits: 8}}}}]\nlower: [{lower}]\n"
        f"evaluate: {evaluate}\nrequire: {require}\n"
    )
    report = gw.optimize(folder, spec, out=tmp_path / "out").report
    assert report["evaluation"]["before"] > 0
    assert report["require"][0]["met"]
    assert bool(lower) == ("token by token" in report["evaluation"]["what"])
