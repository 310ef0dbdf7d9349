"""`graphwright chat`: turns from a pipe and from a terminal, over a tiny random model."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import smollm2
from models.whole_sequence import WholeSequence

from graphwright.backends.base import Compiled
from graphwright.cli import main
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.text import FILES

transformers = pytest.importorskip("transformers")

VOCABULARY = 49152


class Tiny(Compiled):
    """Stands for an opened artifact."""

    def __init__(self, net: Any, folder: Path | None) -> None:
        super().__init__({})
        self.net = net
        self.generation = Generation(
            kind="decoder", context_length=96, vocab_size=VOCABULARY, eos=(2,), pad=2,
            tokenizer=None if folder is None else str(folder),
        )  # fmt: skip

    def runner(self) -> WholeSequence:
        return WholeSequence(self.net)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=96,
        initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        if (smollm2.folder() / name).exists():
            shutil.copy(smollm2.folder() / name, tmp_path / name)
    return tmp_path


def chat(
    monkeypatch: pytest.MonkeyPatch, compiled: Compiled | None, lines: str, *arguments: str,
    is_terminal: bool = False,
) -> int:  # fmt: skip
    monkeypatch.setattr("graphwright.backends.opening.open_artifact", lambda path: compiled)
    stdin = io.StringIO(lines)
    stdin.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", stdin)
    return main(["chat", ".", "--greedy", *arguments])


def test_answers_of_a_pipe_are_those_of_a_conversation(
    net: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Tiny(net, folder)
    talk = model.conversation("Be short.")
    first = talk.say("Hello", max_new_tokens=6, do_sample=False).text
    second = talk.say("And?", max_new_tokens=6, do_sample=False).text
    lines = "Hello\nAnd?\n\n/reset\nHello\n/exit\nnever read\n"
    status = chat(monkeypatch, model, lines, "--system", "Be short.", "--max-new-tokens", "6")
    out, err = capfd.readouterr()
    assert status == 0
    assert out == f"{first}\n{second}\n{first}\n"
    assert err.count("tokens/s") == 3
    assert "6 tokens" in err
    assert "cut by --max-new-tokens" in err


def test_only_what_is_new_of_a_conversation_is_run(net: Any, folder: Path) -> None:
    talk = Tiny(net, folder).conversation()
    first = talk.say("Hello", max_new_tokens=4, do_sample=False)
    second = talk.say("And?", max_new_tokens=4, do_sample=False)
    assert first.run_tokens == first.prompt_tokens
    # the answer was cut, so the template closes it; the rest is the new message
    assert second.run_tokens < first.prompt_tokens < second.prompt_tokens
    ids = torch.tensor([talk.tokens[0][: second.prompt_tokens]])
    expected = net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2, eos_token_id=2)
    assert second.ids == expected[0, ids.shape[1] :].tolist()


def test_plain_continues_a_text(
    net: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Tiny(net, folder)
    expected = model.generate("Once upon", max_new_tokens=5, do_sample=False)
    chat(monkeypatch, model, "Once upon", "--plain", "--quiet", "--max-new-tokens", "5")
    assert capfd.readouterr() == (f"{expected}\n", "")


def test_a_terminal_goes_on_behind_an_error(
    net: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = "word " * 200 + "\nHi\n"
    options = ("--max-new-tokens", "2")
    assert chat(monkeypatch, Tiny(net, folder), lines, *options, is_terminal=True) == 0
    assert "more than the model's context length, 96" in capfd.readouterr().err
    assert chat(monkeypatch, Tiny(net, folder), lines, *options) == 2


def test_what_cannot_chat_is_refused(
    net: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(compiled: Compiled | None, *arguments: str) -> str:
        assert chat(monkeypatch, compiled, "Hi\n", *arguments) == 2
        return capfd.readouterr().err

    assert "this is no artifact. Compile the model first" in said(None)
    assert "has no tokenizer" in said(Tiny(net, None))
    assert "top_p" in said(Tiny(net, folder), "--top-p", "0.5")
    no_decoder = Tiny(net, folder)
    no_decoder.generation = None
    assert "no cache to generate with" in said(no_decoder)
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in said(Tiny(net, folder))
    assert "--system belongs to a chat" in said(Tiny(net, folder), "--plain", "--system", "x")
