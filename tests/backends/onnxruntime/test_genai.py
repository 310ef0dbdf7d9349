"""Folders of decoders in the independent client onnxruntime-genai, token for token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_decoder

import graphwright as gw
from graphwright.backends.base import Artifact, Compiled
from graphwright.backends.onnxruntime.genai import genai_config
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.signature import Signature, TensorSpec

transformers = pytest.importorskip("transformers")

NEW = 20
TEXTS = ["The capital of France is", "x", "def f(x):\n    return é"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Artifact]:
    source, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    model = tiny_decoder.write(source)
    program = trace_decoder(model, folder=source, check=False)
    return model, out, gw.lower(program, "onnxruntime").save(out)


def test_past_a_sliding_window_in_a_ragged_batch(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.MistralConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=6,
        max_position_embeddings=64, initializer_range=0.5, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    program = trace_decoder(model, check=False)
    prompts = [list(range(3, 17)), [5, 9], [40, 2, 7, 7, 1]]
    expected = [theirs(model, ids) for ids in prompts]
    for each in (gw.language_model(program), gw.lower(program, "onnxruntime")):
        done = each.generate(prompts, max_new_tokens=NEW)
        assert isinstance(done, list)
        assert [completion.ids for completion in done] == expected


@pytest.fixture(scope="module")
def opened(saved: tuple[Any, Path, Artifact]) -> Compiled:
    found = gw.load(saved[1])
    assert isinstance(found, Compiled)
    return found


def theirs(model: Any, ids: Sequence[int]) -> list[int]:
    prompt = torch.tensor([list(ids)])
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return [int(i) for i in out[0, len(ids) :]]


def test_the_folder_generates_as_transformers_does(
    saved: tuple[Any, Path, Artifact], opened: Compiled
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved[1])
    expected = [theirs(saved[0], tokenizer(text)["input_ids"]) for text in TEXTS]
    done = opened.generate(TEXTS, max_new_tokens=NEW)
    assert isinstance(done, list)
    assert [each.ids for each in done] == expected
    assert [each.text for each in done] == tokenizer.batch_decode(
        expected, skip_special_tokens=True
    )


def test_genai_generates_the_same_alone_and_in_a_ragged_batch(
    saved: tuple[Any, Path, Artifact], opened: Compiled
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    client = og.Model(str(saved[1]))
    tokenizer = og.Tokenizer(client)

    def generated(prompts: Any, length: int, batch: int) -> list[list[int]]:
        params = og.GeneratorParams(client)
        params.set_search_options(max_length=length + NEW, batch_size=batch, do_sample=False)
        run = og.Generator(client, params)
        run.append_tokens(prompts)
        while not run.is_done():
            run.generate_next_token()
        return [run.get_sequence(row).tolist()[length:] for row in range(batch)]

    expected = [theirs(saved[0], tokenizer.encode(text)) for text in TEXTS]
    ids = [list(tokenizer.encode(text)) for text in TEXTS]
    assert [generated(p, len(p), 1)[0] for p in ids] == expected
    longest = max(map(len, ids))
    assert generated(tokenizer.encode_batch(TEXTS), longest, len(TEXTS)) == expected
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    reader = opened.language_model.tokenizer
    assert reader is not None
    assert list(tokenizer.encode(text)) == reader.encode_chat(messages)


def test_the_folder_holds_what_clients_read(saved: tuple[Any, Path, Artifact]) -> None:
    _, out, artifact = saved
    names = {file.name for file in out.iterdir()}
    assert names == {
        "model.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    assert artifact.notes == ()
    assert artifact.file_bytes == sum(file.stat().st_size for file in out.iterdir())
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["model_max_length"] == tiny_decoder.CONTEXT
    whole = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    assert whole["search"] == {
        "max_length": tiny_decoder.CONTEXT, "past_present_share_buffer": True
    }  # fmt: skip
    assert whole["model"]["decoder"]["num_key_value_heads"] == 1


def test_a_conversation_goes_on_from_the_kept_cache(
    saved: tuple[Any, Path, Artifact], opened: Compiled
) -> None:
    talk = opened.conversation()
    talk.say("Hello", max_new_tokens=6)
    answer = talk.say("And now?", max_new_tokens=6)
    assert answer.run_tokens < answer.prompt_tokens
    prompt = talk.tokens[0][: answer.prompt_tokens]
    assert answer.ids == theirs(saved[0], prompt)[: len(answer.ids)]


def test_without_a_tokenizer_there_is_no_text_interface(
    saved: tuple[Any, Path, Artifact], opened: Compiled, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert opened.generation is not None
    record = opened.generation
    bare = gw.load(saved[1] / "model.onnx")
    assert isinstance(bare, Compiled)
    bare.generation = Generation.from_json({**record.to_json(), "tokenizer": str(source)})
    artifact = bare.save(tmp_path / "out")
    assert artifact.notes == (f"no text interface: {source} holds no tokenizer",)
    again = gw.load(tmp_path / "out")
    assert isinstance(again, Compiled)
    with pytest.raises(gw.ir.errors.ArgumentError, match="came without a tokenizer"):
        again.generate("hello")
    done = again.generate([5, 6, 7], max_new_tokens=4)
    assert not isinstance(done, list)
    assert done.ids == theirs(saved[0], [5, 6, 7])[:4]


def record(**fields: Any) -> Generation:
    whole = {"context_length": 131072, "vocab_size": 100, "eos": (7, 9, 500), "pad": 3, **fields}
    return Generation.from_json(
        {**Generation("decoder").to_json(), "layers": [dict.fromkeys(
            ("past_key", "past_value", "present_key", "present_value"), "k")], **whole}
    )  # fmt: skip


SIGNATURE = Signature((TensorSpec("k", "float32", ("batch", 4, "past", 64)),), (), {"leaf": 0})


def test_the_configuration_names_every_stop_token_and_bounds_the_buffer() -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "num_beams": 4}
    config, notes = genai_config(record(sampling=sampling), SIGNATURE, "m.onnx", shared=True)
    assert notes == []
    assert config is not None
    assert config["model"]["eos_token_id"] == [7, 9]
    assert (config["model"]["pad_token_id"], config["model"]["context_length"]) == (3, 131072)
    assert config["search"] == {
        "do_sample": True, "temperature": 0.6, "max_length": 4096,
        "past_present_share_buffer": True,
    }  # fmt: skip


def test_what_genai_does_not_run_is_said() -> None:
    state = record(states=(("past_state_0", "present_state_0"),))
    assert genai_config(state, SIGNATURE, "m.onnx", shared=False) == (
        None, ["no genai_config.json: onnxruntime-genai does not run a recurrent state"],
    )  # fmt: skip
    _, notes = genai_config(record(eos=(), context_length=None), SIGNATURE, "m.onnx", shared=False)
    assert ["bounds none" in notes[0], "stops at its pad, 3" in notes[1]] == [True, True]
