"""The harness on an artifact against the harness on transformers, over a task made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel

import graphwright as gw
from graphwright.ir.errors import ArgumentError

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with a tokenizer of words."""
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    ))  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    place: Path = tmp_path_factory.mktemp("harness")
    model.save_pretrained(place)
    special = {"w0": 0, "<s>": 1, "</s>": 2}
    inner = tokenizers.Tokenizer(
        WordLevel({**special, **{f"w{i}": i for i in range(3, WORDS)}}, unk_token="w0")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("out")
    (out / "spec.yaml").write_text("version: 1\nlower: [onnxruntime]\n")
    gw.optimize(folder, out / "spec.yaml", out=out / "made")
    return out / "made"


def task(folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    """A task over a file of questions."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, WORDS)}" for _ in range(count))

    rows = [
        {"question": words(draw.randrange(2, 7)), "choices": [words(2), words(3), words(1)],
         "answer": at % 3, "text": words(90)}
        for at in range(7)
    ]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {
        "task": f"made_here_{kind}", "dataset_path": "json", "output_type": kind,
        "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
        "doc_to_text": "{{question}}", "doc_to_target": "answer", **more,
    }  # fmt: skip


def results(model: Any, task: dict[str, Any]) -> Any:
    """Figures of a task, and the answers of the model."""
    import lm_eval

    found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    samples = [row["resps"] for row in found["samples"][task["task"]]]
    return found["results"][task["task"]], samples


@pytest.fixture(scope="module")
def models(folder: Path, artifact: Path) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    from graphwright.lm_eval import GraphwrightLM

    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=3, dtype="float32")
    return GraphwrightLM(artifact, batch_size=3), theirs


def flat(samples: Any) -> list[float]:
    return [float(value[0]) for row in samples for answer in row for value in answer]


def test_choices_are_scored_as_the_harness_scores_transformers(
    folder: Path, models: tuple[Any, Any]
) -> None:
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    made = task(folder, "multiple_choice", doc_to_choice="choices", metric_list=metrics)
    (ours, mine), (theirs, other) = (results(model, made) for model in models)
    assert flat(mine) == pytest.approx(flat(other), abs=1e-4)
    assert [ours[name] for name in ("acc,none", "acc_norm,none")] == [
        theirs[name] for name in ("acc,none", "acc_norm,none")
    ]


def test_long_texts_are_scored_in_the_same_windows(folder: Path, models: tuple[Any, Any]) -> None:
    made = task(
        folder, "loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    models[1]._max_length = models[0].max_length = 32
    (ours, _), (theirs, _) = (results(model, made) for model in models)
    assert ours["word_perplexity,none"] == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)


def test_answers_are_written_as_transformers_writes_them(
    folder: Path, models: tuple[Any, Any]
) -> None:
    made = task(
        folder, "generate_until", generation_kwargs={"max_gen_toks": 9, "until": ["w7"]},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    (_, ours), (_, theirs) = (results(model, made) for model in models)
    assert ours == theirs
    assert any(text for row in ours for text in row[0])


def test_the_name_is_registered_and_no_artifact_is_refused(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    from graphwright.lm_eval import GraphwrightLM

    assert get_model("graphwright") is GraphwrightLM
    with pytest.raises(ArgumentError, match="this is no artifact"):
        GraphwrightLM(tmp_path / "none")
