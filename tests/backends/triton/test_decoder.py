"""Decoders of the triton backend: the cache written in place, tokens against transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.backends.triton.compiled import FusedModule
from graphwright.backends.triton.decoder.buffers import BLOCK, Blocks, WholeRows
from graphwright.backends.triton.decoder.runner import StaticRunner
from graphwright.ir.errors import LoweringError
from graphwright.ir.generation.concat import ConcatRunner, runner_of
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.ops import OPS

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
WINDOW = 5
PROMPTS = [[7, 21, 3, 9, 44, 60, 8], [5], [33, 2, 2, 17]]
"""One is longer than the window."""


def build(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    options = SMALL | ({"sliding_window": WINDOW} if name == "Mistral" else {})
    config = getattr(transformers, f"{name}Config")(**options, eos_token_id=63, bos_token_id=1)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(scope="module", params=["Llama", "Mistral"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, FusedModule]:
    model = build(request.param)
    compiled = gw.lower(trace_decoder(model, check=False), "triton")
    assert isinstance(compiled, FusedModule)
    return model, compiled


def theirs(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in found[0, len(prompt) :]]


def test_greedy_tokens_are_transformers_alone_in_a_ragged_batch_and_from_a_file(
    pair: tuple[Any, FusedModule], tmp_path: Path
) -> None:
    model, compiled = pair
    expected = [theirs(model, prompt, 20) for prompt in PROMPTS]
    compiled.save(tmp_path)
    opened = gw.load(tmp_path)
    for found in (compiled.generate(PROMPTS, max_new_tokens=20),
                  opened.generate(PROMPTS, max_new_tokens=20)):  # fmt: skip
        assert [done.ids for done in found] == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert compiled.generate([prompt], max_new_tokens=20)[0].ids == tokens


def test_a_conversation_goes_on_from_the_kept_cache(pair: tuple[Any, FusedModule]) -> None:
    model, compiled = pair
    first = theirs(model, PROMPTS[0], 6)
    text = [*PROMPTS[0], *first, 11, 12, 13]
    runner = compiled.runner()
    runner.start(1, len(text) + 8)
    runner.run(torch.tensor([text[:13]]), torch.tensor([13]))
    logits, found = runner.run(torch.tensor([text[13:]]), torch.tensor([len(text) - 13])), []
    for _ in range(6):
        found.append(int(logits.argmax()))
        logits = runner.run(torch.tensor([found[-1:]]), torch.tensor([1]))
    assert found[: len(theirs(model, text, 6))] == theirs(model, text, 6)


def random_ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ([[7, 7], [1, 1], [1, 0], [2, 3], [1, 1]], WholeRows),
        ([[70, 2], [1, 1], [0, 1], [3, 2], [1, 1]], Blocks),
    ],
)
def test_the_runner_is_the_one_that_hands_the_cache_in_and_out(
    pair: tuple[Any, FusedModule], counts: list[list[int]], kind: type
) -> None:
    _, compiled = pair
    runner = compiled.runner()
    assert isinstance(runner, StaticRunner)
    record = Generation.of(compiled.program)
    assert record is not None
    other = runner_of(compiled.program, record)
    for each in (runner, other):
        each.start(2, 100)
    for step, given in enumerate(counts):
        count = torch.tensor(given)
        ids = random_ids(2, max(given), step)
        found, expected = runner.run(ids, count), other.run(ids, count)
        torch.testing.assert_close(found[count > 0], expected[count > 0], rtol=1e-4, atol=1e-5)
    assert isinstance(runner._buffers, kind)
    for each in (runner, other):
        each.reorder(torch.tensor([1, 0, 1]))
        each.rewind(each.lengths - 2)
        each.grow(200)
    ids, count = random_ids(3, 4, 9), torch.tensor([4, 4, 4])
    torch.testing.assert_close(
        runner.run_all(ids, count), other.run_all(ids, count), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(runner.lengths, other.lengths)


def test_rows_of_unlike_lengths_take_blocks_as_they_grow(pair: tuple[Any, FusedModule]) -> None:
    runner = pair[1].runner()
    assert isinstance(runner, StaticRunner)
    runner.start(3, 20 * BLOCK)
    runner.run(random_ids(3, 2 * BLOCK, 0), torch.tensor([2 * BLOCK, 1, 3]))
    block = 2 * 8 * BLOCK * 4 * 4  # heads, size, tokens, bytes, buffers
    assert runner.cache_bytes == block * (1 + 2 + 1 + 1)
    runner.run(random_ids(3, 1, 0), torch.tensor([1, 1, 1]))
    assert runner.cache_bytes >= block * 6


def test_the_graph_repeats_no_heads_and_reads_no_mask(pair: tuple[Any, FusedModule]) -> None:
    graph = pair[1].static_graph(last=True).graph
    names = [op_name(node) for node in graph.nodes]
    assert names.count("cached_attention") == 2
    assert not {"scaled_dot_product_attention", "arange", "le"} & set(names)
    inputs = [node.name for node in graph.find_nodes(op="placeholder")]
    assert inputs[:5] == [
        "input_ids", "position_ids", "cache_lengths", "token_counts", "block_table"
    ]  # fmt: skip
    assert pair[1].notes["cache"] == "written in place: 2 layers"


def test_a_decoder_of_capped_attention_with_sinks_writes_in_place_too() -> None:
    import transformers

    torch.manual_seed(0)
    options = SMALL | {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**options, eos_token_id=63, attn_logit_softcapping=2.0)
    ).eval()
    compiled = gw.lower(trace_decoder(model, check=False), "triton")
    assert isinstance(compiled.runner(), StaticRunner)
    expected = [theirs(model, prompt, 12) for prompt in PROMPTS]
    assert [done.ids for done in compiled.generate(PROMPTS, max_new_tokens=12)] == expected


def test_what_is_read_elsewhere_is_copied_and_said() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=4, eos_token_id=63
    )
    model = transformers.BloomForCausalLM(config).eval()
    compiled = gw.lower(trace_decoder(model, check=False), "triton")
    assert isinstance(compiled.runner(), ConcatRunner)
    (said,) = compiled.notes["warnings"]
    assert said.startswith("the cache is copied at every step: ")
    expected = [theirs(model, prompt, 8) for prompt in PROMPTS]
    assert [done.ids for done in compiled.generate(PROMPTS, max_new_tokens=8)] == expected


def test_a_cache_that_goes_wrong_is_refused(
    pair: tuple[Any, FusedModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(OPS["cached_attention"].eager.__module__)
    right = module.Cache.write
    monkeypatch.setattr(module.Cache, "write", lambda self, new, at: right(self, new.flip(1), at))
    with pytest.raises(LoweringError, match="with its cache written in place"):
        gw.lower(pair[1].program, "triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a captured step needs a GPU")
def test_a_captured_step_gives_the_tokens_of_eager(pair: tuple[Any, FusedModule]) -> None:
    model, compiled = pair
    expected = [theirs(model, prompt, 20) for prompt in PROMPTS]
    moved = compiled.to("cuda")
    try:
        assert [done.ids for done in moved.generate(PROMPTS, max_new_tokens=20)] == expected
    finally:
        compiled.to("cpu")
