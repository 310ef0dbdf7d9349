"""Metrics against formulas written out, and what each of them needs."""

import math
import textwrap

import numpy as np
import pytest
import torch

from graphwright.evaluation.evaluate import evaluate
from graphwright.ir.data.batches import Batches, load_data
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature, TensorSpec

DIMS = {"batch": DimRange(), "seq": DimRange()}
PLAIN = Signature((TensorSpec("x", "float32", ("batch", 4)),), (), {}, DIMS)
TOKENS = Signature(
    (
        TensorSpec("input_ids", "int64", ("batch", "seq")),
        TensorSpec("attention_mask", "int64", ("batch", "seq")),
    ),
    (),
    {},
    DIMS,
)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 5, generator=GENERATOR)
NOISE = torch.randn(4, 5, generator=GENERATOR) * 0.3


def plain_data(labels=True, rows=11, batch=4):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 4, generator=g), torch.randint(0, 5, (rows,), generator=g)

    def read():
        for start in range(0, rows, batch):
            piece = {"x": x[start : start + batch]}
            yield piece | ({"labels": y[start : start + batch]} if labels else {})

    return Batches("made up", PLAIN, read, "labels" if labels else None), x, y


def before(x):
    return {"logits": x @ WEIGHT}


def after(x):
    return {"logits": x @ (WEIGHT + NOISE)}


def test_cosine_is_the_mean_over_samples():
    data, x, _ = plain_data(labels=False)
    a, b = (x @ WEIGHT).double().numpy(), (x @ (WEIGHT + NOISE)).double().numpy()
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    expected = ((a * b).sum(1) / norms).mean()
    found = evaluate(before, after, data, "cosine")
    assert found.after == pytest.approx(expected, rel=1e-6)  # float32 products of four terms
    assert found.before == 1.0
    assert found.drop == pytest.approx(1 - expected, rel=1e-5)
    assert found.samples == 11
    assert found.what == "logits, one vector per sample"


def test_cosine_does_not_depend_on_the_size_of_the_vectors():
    data, _, _ = plain_data(labels=False)
    plain = evaluate(before, after, data, "cosine").after
    for scale in (1e-3, 1e3):
        small = evaluate(
            lambda x, s=scale: {"logits": before(x)["logits"] * s},
            lambda x, s=scale: {"logits": after(x)["logits"] * s},
            data,
            "cosine",
        )
        assert small.after == pytest.approx(plain, rel=1e-6)


def test_cosine_of_hidden_states_averages_kept_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = torch.ones(2, 3, dtype=torch.int64)
    data = Batches("m", TOKENS, lambda: [{"input_ids": ids, "attention_mask": mask}])
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    padded = hidden.clone()
    padded[0, 2] = math.nan  # what stands at a padded place does not matter
    same = evaluate(lambda **_: {"h": hidden}, lambda **_: {"h": padded}, data, "cosine")
    assert same.after == pytest.approx(1.0, abs=1e-12)
    assert "averaged over the tokens" in same.what
    other = hidden.clone()
    other[0, 0] *= -1
    pooled = [np.stack([h[0, :2].mean(0), h[1].mean(0)]) for h in (hidden.numpy(), other.numpy())]
    norms = np.linalg.norm(pooled[0], axis=1) * np.linalg.norm(pooled[1], axis=1)
    expected = ((pooled[0] * pooled[1]).sum(1) / norms).mean()
    found = evaluate(lambda **_: {"h": hidden}, lambda **_: {"h": other}, data, "cosine")
    assert found.after == pytest.approx(expected, rel=1e-5)


def test_cosine_of_zero_vectors():
    data, *_ = plain_data(labels=False, rows=4)
    zero = torch.zeros(4, 3)
    assert evaluate(lambda x: zero, lambda x: zero, data, "cosine").after == 1.0
    assert evaluate(lambda x: zero, lambda x: zero + 1, data, "cosine").after == 0.0


def test_a_zero_vector_is_not_like_one_that_is_zero_in_places():
    data, _, _ = plain_data(labels=False)
    places = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    found = evaluate(
        lambda x: {"logits": torch.zeros(len(x), 5)},
        lambda x: {"logits": places.expand(len(x), 5)},
        data,
        "cosine",
    )
    assert (found.before, found.after) == (1.0, 0.0)


def test_a_vector_that_is_turned_round_counts_as_minus_one():
    data, _, _ = plain_data(labels=False)
    found = evaluate(before, lambda x: {"logits": -2 * before(x)["logits"]}, data, "cosine")
    assert found.after == pytest.approx(-1.0)
    assert found.drop == pytest.approx(2.0)


def test_accuracy():
    data, x, y = plain_data()
    found = evaluate(before, after, data, "accuracy")
    expected = [float((m(x)["logits"].argmax(1) == y).float().mean()) for m in (before, after)]
    assert [found.before, found.after] == pytest.approx(expected)
    assert found.drop == pytest.approx(expected[0] - expected[1])


def test_accuracy_ignores_labels_of_minus_100():
    y = torch.tensor([0, -100, 1])
    data = Batches("m", PLAIN, lambda: [{"x": torch.zeros(3, 4), "labels": y}], "labels")
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert evaluate(lambda x: logits, lambda x: logits, data, "accuracy").after == 0.5


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    ids = torch.randint(0, 7, (2, 5), generator=GENERATOR)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    data = Batches("m", TOKENS, lambda: [{"input_ids": ids, "attention_mask": mask}])
    found = evaluate(
        lambda **_: torch.zeros(2, 5, 7), lambda **_: torch.zeros(2, 5, 7), data, "perplexity"
    )
    assert found.before == pytest.approx(7.0)
    assert not found.higher_is_better


def test_perplexity_predicts_the_next_token():
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    data = Batches("m", TOKENS, lambda: [{"input_ids": ids, "attention_mask": ids * 0 + 1}])
    logits = torch.randn(1, 5, 7, generator=GENERATOR)
    log_p = np.log(
        np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(-1)[..., None]
    )
    nll = -np.mean([log_p[0, t, ids[0, t + 1]] for t in range(4)])
    sharp = torch.zeros(1, 5, 7).scatter_(2, ids.roll(-1, 1)[..., None], 50.0)
    found = evaluate(lambda **_: logits, lambda **_: sharp, data, "perplexity")
    assert found.before == pytest.approx(math.exp(nll), rel=1e-9)
    assert found.after == pytest.approx(1.0)
    assert found.drop == pytest.approx(1.0 - math.exp(nll))  # it got better: a negative loss


def test_snr_has_no_drop():
    data, x, _ = plain_data(labels=False)
    found = evaluate(before, after, data, "snr_db")
    a, b = (x @ WEIGHT).double(), (x @ (WEIGHT + NOISE)).double()
    expected = 10 * math.log10(float(a.square().sum() / (a - b).square().sum()))
    assert found.after == pytest.approx(expected, rel=1e-5)
    assert found.to_json()["before"] is None
    assert found.to_json()["drop"] is None


@pytest.mark.parametrize("metric", ["cosine", "snr_db", "accuracy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_finite_outputs_is_not_evaluated(metric, value):
    data, *_ = plain_data()
    with pytest.raises(ArgumentError, match="no finite value on any of the data"):
        evaluate(*[lambda x: torch.full((len(x), 5), value)] * 2, data, metric)


def test_results_that_are_not_finite_count_as_lost():
    data, x, y = plain_data()

    def partly(x):
        logits = before(x)["logits"].clone()
        logits[0] = math.nan  # the first of every batch of four
        return {"logits": logits}

    found = evaluate(before, partly, data, "cosine")
    assert (found.before, found.after) == pytest.approx((1.0, 8 / 11))
    other = evaluate(partly, before, data, "cosine")
    assert (other.samples, other.after) == (8, pytest.approx(1.0))
    right = before(x)["logits"].argmax(1) == y
    kept = torch.arange(11) % 4 != 0
    accuracy = evaluate(before, partly, data, "accuracy")
    assert accuracy.after == pytest.approx(float((right & kept).sum()) / 11)
    snr = evaluate(before, partly, data, "snr_db").to_json()
    assert (snr["after"], snr["exact"]) == (None, False)
    assert evaluate(before, before, data, "snr_db").to_json()["exact"]


METRICS = """
    def error(outputs, batch):
        return float((outputs["logits"].argmax(1) != batch["labels"]).float().mean())
    error.higher_is_better = False
    def fails(outputs, batch):
        raise KeyError("nothing there")
    number = 3
"""


def test_own_metric_with_its_direction(tmp_path):
    (tmp_path / "own_metrics.py").write_text(textwrap.dedent(METRICS))
    data, x, y = plain_data()
    found = evaluate(before, after, data, "own_metrics:error", root=tmp_path)
    wrong = [float((m(x)["logits"].argmax(1) != y).float().mean()) for m in (before, after)]
    assert [found.before, found.after] == pytest.approx(wrong)
    assert found.drop == pytest.approx(wrong[1] - wrong[0], abs=1e-6)  # float32 means
    with pytest.raises(ArgumentError, match="own_metrics:fails: KeyError: 'nothing there'"):
        evaluate(before, after, data, "own_metrics:fails", root=tmp_path)
    with pytest.raises(ArgumentError, match="is no function"):
        evaluate(before, after, data, "own_metrics:number", root=tmp_path)
    with pytest.raises(ArgumentError, match="cannot import"):
        evaluate(before, after, data, "no_such_metrics:x", root=tmp_path)


UNLABELLED = """
    def size(outputs, batch):
        assert set(batch) == {"x"}
        return float(outputs["logits"].abs().mean())
"""


def test_own_metric_without_labels_or_direction(tmp_path):
    """It is given the inputs alone, and larger values are taken for better ones."""
    (tmp_path / "own_size.py").write_text(textwrap.dedent(UNLABELLED))
    data, x, _ = plain_data(labels=False)
    found = evaluate(before, after, data, "own_size:size", root=tmp_path)
    sizes = [float(m(x)["logits"].abs().mean()) for m in (before, after)]
    assert found.higher_is_better
    assert found.drop == pytest.approx(sizes[0] - sizes[1], abs=1e-6)


def test_the_output_named_logits_is_the_one_that_counts():
    data, x, y = plain_data()

    def several(x):
        return {"hidden": -before(x)["logits"], "ids": x.long(), "logits": before(x)["logits"]}

    found = evaluate(several, several, data, "accuracy")
    assert found.after == pytest.approx(float((before(x)["logits"].argmax(1) == y).double().mean()))
    assert "logits" in found.what


def test_a_perplexity_beyond_all_numbers_is_still_one():
    ids = torch.tensor([[3, 1, 4]])
    data = Batches("m", TOKENS, lambda: [{"input_ids": ids, "attention_mask": ids * 0 + 1}])
    wrong = torch.zeros(1, 3, 7).scatter_(2, ids.roll(-1, 1)[..., None], -5000.0)
    found = evaluate(lambda **_: wrong * 0, lambda **_: wrong, data, "perplexity")
    assert 1e300 < found.after < math.inf


def test_metrics_say_what_they_lack():
    data, *_ = plain_data(labels=False)
    with pytest.raises(ArgumentError, match="accuracy needs labels"):
        evaluate(before, after, data, "accuracy")
    with pytest.raises(ArgumentError, match="perplexity needs labels"):
        evaluate(before, after, data, "perplexity")
    with pytest.raises(ArgumentError, match="no floating-point output"):
        evaluate(lambda x: x.long(), lambda x: x.long(), data, "cosine")
    labelled, *_ = plain_data()
    with pytest.raises(ArgumentError, match="do not fit"):
        evaluate(lambda x: x[None], lambda x: x[None], labelled, "accuracy")


def test_progress_is_told():
    seen = []
    data = load_data({"data": "synthetic", "samples": 9, "batch_size": 4}, PLAIN, 0)
    evaluate(lambda x: x, lambda x: x, data, "cosine", progress=lambda *a: seen.append(a))
    assert seen == [("cosine", 0, 3), ("cosine", 1, 3), ("cosine", 2, 3)]
