"""A cache that is handed in and out, against transformers run on every row's whole text."""

import pytest
import torch
from models import cached
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.record import Generation
from graphwright.ir.signature import Signature, TensorSpec

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "windows of 4": MistralConfig(**SIZES, sliding_window=4, head_dim=8),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def padded(texts):
    counts = torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), int(counts.max()), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
    return ids, counts


def whole(model, text):
    with torch.inference_mode():
        return model(torch.tensor([text])).logits[0]


PIECES = (
    ([1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12]),
    ([13], [14], [15]),
    ([16, 17, 18], [], [19, 20, 21, 22, 23, 24, 25]),
    ([26], [27], [28]),
    ([29], [30, 31, 32, 33, 34, 35], [36]),
)
"""New tokens of three rows, call by call."""


def test_rows_of_any_lengths_give_the_logits_of_the_whole_texts(model):
    runner = cached.runner_of(model)
    runner.start(3, 64)
    texts = [[], [], []]
    for pieces in PIECES:
        texts = [[*text, *piece] for text, piece in zip(texts, pieces, strict=True)]
        logits = runner.run_all(*padded(pieces))
        for row, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            if piece:
                expected = whole(model, text)[-len(piece) :]
                torch.testing.assert_close(logits[row, : len(piece)], expected, atol=1e-5, rtol=0)
        assert runner.lengths.tolist() == [len(text) for text in texts]


def test_the_logits_of_last_tokens_are_those_of_each_row(model):
    runner, reference = cached.runner_of(model, has_all_logits=False), cached.runner_of(model)
    for one in (runner, reference):
        one.start(3, 64)
    for pieces in PIECES:
        found, expected = runner.run(*padded(pieces)), reference.run(*padded(pieces))
        rows = [row for row, piece in enumerate(pieces) if piece]
        assert torch.equal(found[rows], expected[rows])


def test_rewound_and_reordered_rows_go_on_from_where_they_are(model):
    runner = cached.runner_of(model)
    runner.start(3, 64)
    runner.run(*padded(PIECES[0]))
    runner.rewind(torch.tensor([5, 1, 4]))
    runner.reorder(torch.tensor([2, 0, 0, 1]))
    texts = [[*PIECES[0][2]], [*PIECES[0][0][:5]], [*PIECES[0][0][:5]], [*PIECES[0][1][:1]]]
    new = ([40, 41], [42], [43, 44, 45], [46])
    logits = runner.run(*padded(new))
    for row, (text, piece) in enumerate(zip(texts, new, strict=True)):
        expected = whole(model, [*text, *piece])[-1]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


def test_a_state_is_not_taken_back():
    record = Generation("decoder", mask=None, states=(("past_state_0", "present_state_0"),))
    state = TensorSpec("past_state_0", "float32", ("batch", 3))
    runner = ConcatRunner(record, Signature((state,), (), {}), lambda inputs: inputs)
    runner.start(1, 8)
    runner.lengths = torch.tensor([4])
    with pytest.raises(ArgumentError, match="cannot be taken back"):
        runner.rewind(torch.tensor([3]))


def test_a_state_does_not_see_padding():
    """A model whose state is the sum of its tokens: one of padding would show."""
    record = Generation(
        "decoder", mask=None, states=(("past_state_0", "present_state_0"),), vocab_size=1
    )
    specs = (
        TensorSpec("input_ids", "int64", ("batch", "seq")),
        TensorSpec("past_state_0", "float32", ("batch", 1)),
    )
    outputs = (
        TensorSpec("logits", "float32", ("batch", "seq", 1)),
        TensorSpec("present_state_0", "float32", ("batch", 1)),
    )

    def run(inputs):
        ids, state = inputs
        sums = state[:, None] + ids[..., None].float().cumsum(1)
        return sums, sums[:, -1]

    runner = ConcatRunner(record, Signature(specs, outputs, {}), run)
    runner.start(2, 16)
    runner.run(torch.tensor([[1, 2, 3], [4, 99, 99]]), torch.tensor([3, 1]))
    logits = runner.run(torch.tensor([[10, 99], [20, 30]]), torch.tensor([1, 2]))
    assert logits[:, 0].tolist() == [16.0, 54.0]
