"""Decoders with a cache in ONNX Runtime: fused attention, ragged batches, what is left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conformance.zoo import transformers
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.onnxruntime.compiled import OnnxCompiled
from graphwright.backends.onnxruntime.shared_cache import SharedCacheRunner
from graphwright.backends.onnxruntime.steps import cached_attention
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.generation.visible import visible
from graphwright.passes.quantize.rtn import Rtn

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 60, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
BLOOM = {"vocab_size": 60, "hidden_size": 64, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {**SIZES, "sliding_window": 4}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "gemma2": ("Gemma2", {**SIZES, "head_dim": 16, "sliding_window": 4, "layer_types": LAYERS}),
    "gemma3": ("Gemma3", {**SIZES, "head_dim": 16, "sliding_window": 4, "layer_types": LAYERS}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "rotary_pct": 0.5}),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 2, "sliding_window": None}),
}
CONFIGS = {"gemma3": "Gemma3TextConfig"}
INSIDE = {"mistral", "qwen3", "gemma2", "gemma3", "mixtral"}
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [3, 1, 4], [2])
STEPS = 6


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    stem, settings = FAMILIES[family]
    if "num_key_value_heads" in settings and family == "gpt_neox":
        settings = {k: v for k, v in settings.items() if k != "num_key_value_heads"}
    config = CONFIGS.get(family, f"{stem}Config")
    model: nn.Module = transformers(f"{stem}ForCausalLM", config, **settings)().eval()
    return model


def lowered(model: nn.Module | gw.Program, **options: Any) -> OnnxCompiled:
    program = model if isinstance(model, gw.Program) else trace_decoder(model, check=False)
    compiled = gw.lower(program, "onnxruntime", **options)
    assert isinstance(compiled, OnnxCompiled)
    return compiled


def in_steps(runner: Runner, capacity: int) -> list[Tensor]:
    """Logits behind the prompts and behind every further token, which are the likeliest ones."""
    ids = torch.zeros(len(PROMPTS), max(map(len, PROMPTS)), dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    runner.start(len(PROMPTS), capacity)
    found = [runner.run(ids, torch.tensor([len(prompt) for prompt in PROMPTS]))]
    for _ in range(STEPS):
        if int(runner.lengths.max()) == runner.capacity:
            runner.grow(2 * runner.capacity)
        token = found[-1].argmax(-1, keepdim=True)
        found.append(runner.run(token, torch.ones(len(PROMPTS), dtype=torch.int64)))
    return found


@torch.no_grad()
def by_transformers(model: Any) -> list[Tensor]:
    """The same by the model with its own cache, row by row."""
    rows = []
    for prompt in PROMPTS:
        tokens, cache, found = torch.tensor([prompt]), None, []
        for _ in range(STEPS + 1):
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, -1])
            tokens = found[-1].argmax()[None, None]
        rows.append(torch.stack(found))
    return list(torch.stack(rows, 1))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return float((torch.stack(found) - torch.stack(expected)).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_in_steps_is_transformers_with_its_cache(family: str) -> None:
    model = build(family)
    compiled = lowered(model)
    assert compiled.notes["warnings"] == []
    assert compiled.notes["kernels"]["GroupQueryAttention"] == 2
    assert compiled.notes["cache"] == {
        "form": "shared",
        "rotary": "inside" if family in INSIDE else "outside",
        "logits": "last",
    }
    runner = compiled.runner()
    assert isinstance(runner, SharedCacheRunner)
    # windows of 4 are crossed by the longest prompt and by every row's steps
    assert error(in_steps(runner, capacity=8), by_transformers(model)) < 1e-5


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers("LlamaForCausalLM", "LlamaConfig", **SIZES)().eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program(llama: nn.Module) -> gw.Program:
    return trace_decoder(llama, check=False)


@pytest.mark.parametrize(("field", "change"), [("scale", 1 + 1e-4), ("window", 1)])
def test_a_kernel_that_is_a_little_wrong_is_left_out(
    field: str, change: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor off by a ten-thousandth, a window longer by a token: beyond what rounding loses."""
    right = cached_attention.find_cached

    def wrong(*arguments: Any) -> Any:
        found, left = right(*arguments)
        value = getattr(found[0], field)
        bad = replace(found[0], **{field: value * change if field == "scale" else value + change})
        return [bad, *found[1:]], left

    monkeypatch.setattr(cached_attention, "find_cached", wrong)
    compiled = lowered(build("mistral"))
    assert "GroupQueryAttention" not in compiled.notes["kernels"]
    assert compiled.notes["cache"]["form"] == "joined"
    assert any("cached_attention" in line for line in compiled.notes["warnings"])


@pytest.fixture(scope="module")
def compiled(program: gw.Program) -> OnnxCompiled:
    return lowered(program)


@pytest.fixture(scope="module")
def full(program: gw.Program) -> OnnxCompiled:
    return lowered(program, logits="all")


def run(runner: Runner, *rows: list[int]) -> Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return runner.run(ids, torch.tensor([len(row) for row in rows]))


def test_without_the_step_the_cache_is_joined_and_the_logits_are_the_same(
    program: gw.Program, compiled: OnnxCompiled
) -> None:
    joined = lowered(program, skip=["cached_attention"])
    assert joined.notes["cache"] == {"form": "joined", "logits": "last"}
    assert isinstance(joined.runner(), ConcatRunner)
    assert error(in_steps(joined.runner(), 64), in_steps(compiled.runner(), 64)) < 1e-5


def test_what_has_no_form_in_the_kernel_is_said_and_runs() -> None:
    torch.manual_seed(0)
    model = transformers("BloomForCausalLM", "BloomConfig", **BLOOM)().eval()
    compiled = lowered(model)
    (warning,) = compiled.notes["warnings"]
    assert "the cache is copied at every step" in warning
    assert set(compiled.notes["cache"]["left"]) == {"layer 0", "layer 1"}
    assert error(in_steps(compiled.runner(), 64), by_transformers(model)) < 1e-5


def test_several_tokens_on_a_ragged_past(full: OnnxCompiled) -> None:
    parted, whole = full.runner(), full.runner()
    parted.start(2, 16)
    run(parted, [5, 6, 7], [8])
    found = run(parted, [9], [10, 11, 12])
    whole.start(2, 16)
    expected = run(whole, [5, 6, 7, 9], [8, 10, 11, 12])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert parted.lengths.tolist() == [4, 4]


def test_a_row_without_tokens_keeps_what_it_has(compiled: OnnxCompiled) -> None:
    runner, alone = compiled.runner(), compiled.runner()
    runner.start(2, 16)
    run(runner, [5, 6, 7], [8, 9])
    run(runner, [], [3])
    run(runner, [], [4])
    found = run(runner, [10], [11])
    alone.start(1, 16)
    torch.testing.assert_close(found[:1], run(alone, [5, 6, 7, 10]), atol=1e-6, rtol=0)
    assert runner.lengths.tolist() == [4, 5]


def test_rows_reordered_and_rewound(compiled: OnnxCompiled) -> None:
    runner, alone = compiled.runner(), compiled.runner()
    runner.start(2, 16)
    run(runner, [5, 6, 7], [8, 9])
    runner.reorder(torch.tensor([1, 0, 1]))
    assert runner.lengths.tolist() == [2, 3, 2]
    runner.rewind(torch.tensor([2, 1, 1]))
    found = run(runner, [3], [3], [3])
    for row, prompt in enumerate(([8, 9, 3], [5, 3], [8, 3])):
        alone.start(1, 8)
        torch.testing.assert_close(found[row], run(alone, prompt)[0], atol=1e-6, rtol=0)
    with pytest.raises(ArgumentError, match="rewound to more tokens"):
        runner.rewind(torch.tensor([9, 0, 0]))


def test_last_logits_are_those_of_the_last_token_and_all_are_refused(
    compiled: OnnxCompiled, full: OnnxCompiled
) -> None:
    last, every = compiled.runner(), full.runner()
    last.start(2, 8)
    every.start(2, 8)
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    counts = torch.tensor([3, 1])
    found, expected = last.run(ids, counts), every.run_all(ids, counts)
    torch.testing.assert_close(found[0], expected[0, 2], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], expected[1, 0], atol=1e-6, rtol=0)
    with pytest.raises(ArgumentError, match="last token only"):
        last.run_all(ids, counts)


def test_a_long_prompt_is_run_in_parts(
    compiled: OnnxCompiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = compiled.runner(), compiled.runner()
    whole.start(2, 8)
    expected = run(whole, [5, 6, 7, 8, 9], [3, 4])
    monkeypatch.setattr("graphwright.backends.onnxruntime.shared_cache.CHUNK", 2)
    parted.start(2, 8)
    torch.testing.assert_close(run(parted, [5, 6, 7, 8, 9], [3, 4]), expected, atol=1e-6, rtol=0)


def test_masks_of_any_kind_are_run_row_by_row(program: gw.Program, full: OnnxCompiled) -> None:
    record = Generation.of(program)
    assert record is not None
    generator = torch.Generator().manual_seed(0)
    masks = {
        3: [[0, 0, 1], [1, 1, 1], [0, 1, 1]],  # prompts, padded on the left
        7: [[0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],  # on pasts
    }
    for total, rows in masks.items():
        mask = torch.tensor(rows)
        given = {
            "input_ids": torch.randint(0, 60, (3, 3), generator=generator),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -3:],
        }
        given |= {n: torch.randn(3, 2, total - 3, 16, generator=generator) for n in record.past}
        inputs = program.bind(**given)
        own, found = (
            visible(record, program.signature, inputs, side.run_flat(inputs))
            for side in (program, full)
        )
        for spec, a, b in zip(program.signature.outputs, own, found, strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=0, msg=spec.name)


def nodes(model: onnx.ModelProto, kind: str) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type == kind)


def test_the_file_has_the_names_and_sizes_that_clients_look_for(
    compiled: OnnxCompiled, tmp_path: Path
) -> None:
    compiled.save(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["past_key_values.1.key"] == ["batch", 2, "past", 16]
    assert shapes["present.0.value"] == ["batch", 2, "total", 16]
    assert shapes["logits"] == ["batch", 1, 60]
    assert "position_ids" not in shapes
    # buffers may be longer than the past in them: nothing but attention reads one
    pasts = {name for name in shapes if name.startswith("past_")}
    readers = {n.op_type for n in model.graph.node if pasts & {*n.input}}
    assert readers == {"GroupQueryAttention"}
    opened = gw.load(tmp_path)
    assert isinstance(opened, OnnxCompiled)
    assert opened.generation is not None
    assert opened.generation.padding == "right"
    assert error(in_steps(opened.runner(), 16), in_steps(compiled.runner(), 16)) == 0


def test_a_tied_head_is_stored_once_in_its_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = {**SIZES, "tie_word_embeddings": True, "vocab_size": 640}
    program = trace_decoder(transformers("LlamaForCausalLM", "LlamaConfig", **tied)(), check=False)
    program = Rtn(bits=4, block=32, targets=["*", "*embed_tokens*", "*lm_head*"])(program)
    compiled = lowered(program)
    record = Generation.of(program)
    assert record is not None
    compiled.save(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    (table,) = nodes(model, "GatherBlockQuantized")
    products = list(nodes(model, "MatMulNBits"))
    assert len(products) == 15
    assert not list(nodes(model, "MatMul"))
    stored = [t.name for t in model.graph.initializer if 640 in t.dims]
    assert len([name for name in stored if "codes" in name]) == 1, table.input
