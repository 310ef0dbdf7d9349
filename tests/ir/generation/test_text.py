"""Tokenizers and chat templates, against transformers' own reading of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import smollm2

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.generation.chat_template import ChatTemplate
from graphwright.ir.generation.stops import Stops, Writer
from graphwright.ir.generation.text import Tokenizer, open_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello, world", " two  spaces\n\nand lines\t", "naïve café 日本語 العربية",
    "👍🏽 😀 family 👨‍👩‍👧",
    "def f(x):\n    return x ** 2  # <|im_end|> inside", "", "1234567890 %$#@!",
]  # fmt: skip
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4 <b>'quoted'</b>"},
    {"role": "user", "content": "And é?"},
]
LOOPS = (
    "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
    "  {{ bos_token }}[{{ m['role'] | upper }}] {{ m | tojson }}\n"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}[ANSWER]{% endif %}"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.folder()


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    found = open_tokenizer(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_and_decoded_as_transformers_does(
    ours: Tokenizer, theirs: Any, text: str
) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, special=True) == theirs.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_same_text_in_whole_characters(ours: Tokenizer, text: str) -> None:
    stream = ours.stream()
    ids = ours.encode(text)
    parts = [stream.put(token) for token in ids]
    assert "".join([*parts, stream.rest()]) == ours.decode(ids)
    assert all("\ufffd" not in part for part in parts)


def test_a_conversation_is_rendered_as_transformers_does(ours: Tokenizer, theirs: Any) -> None:
    for messages in (CHAT, CHAT[1:2]):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.encode_chat(messages) == expected["input_ids"]


def test_templates_may_use_what_transformers_offers(ours: Tokenizer, theirs: Any) -> None:
    expected = theirs.apply_chat_template(
        CHAT, chat_template=LOOPS, add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplate(LOOPS, ours.special_tokens, "").render(CHAT) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ 'a' * 1000000000 }}", "too long"),
        ("{{ 10 ** 1000000000 }}", "too large"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "it wrote over"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_template_can_reach_nothing(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatTemplate(source, {}, "chat_template.jinja").render(CHAT)


def test_what_a_template_refuses_is_said() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, "t.jinja")
    with pytest.raises(ArgumentError, match=r"t.jinja: .* refuses .*: roles must alternate"):
        template.render(CHAT)
    with pytest.raises(ModelError, match="no valid template"):
        ChatTemplate("{% for %}", {}, "t.jinja")
    with pytest.raises(ArgumentError, match="a message needs `role` and `content`"):
        template.render([{"role": "user"}])


def small(tmp_path: Path, folder: Path, config: dict[str, Any]) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer(tmp_path)


def test_a_base_model_has_no_template(tmp_path: Path, folder: Path) -> None:
    tokenizer = small(tmp_path, folder, {})
    assert tokenizer.template is None
    with pytest.raises(ArgumentError, match="no chat template: it continues texts"):
        tokenizer.encode_chat(CHAT)


def test_of_several_templates_the_default_is_taken(tmp_path: Path, folder: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer = small(tmp_path, folder, {"chat_template": named})
    assert tokenizer.template is not None
    assert tokenizer.template.render(CHAT) == "D"
    other = small(tmp_path, folder, {"chat_template": named[:1]})
    with pytest.raises(ModelError, match=r"\['tools'\], and none is `default`"):
        _ = other.template


def test_damaged_files_are_named(tmp_path: Path, folder: Path) -> None:
    assert open_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": {}}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer.json: the tokenizer cannot be read"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="holds no JSON object"):
        open_tokenizer(tmp_path)


def test_a_stop_text_never_shows(ours: Tokenizer) -> None:
    stops = Stops(frozenset(), ("END OF", "\n\n"), ours)
    shown: list[str] = []
    writer = Writer(ours.stream(), stops, shown.append)
    ended = [writer.add(token) for token in ours.encode("An EN is no END, this is: END OF it")]
    assert writer.close() == "".join(shown) == "An EN is no END, this is: "
    assert sum(ended[:-2]) <= 1
    assert any(ended)


def test_a_stop_text_that_is_a_special_token_stops_by_its_id(ours: Tokenizer) -> None:
    assert ours.special_id("<|im_end|>") == ours.encode("<|im_end|>")[0]
    assert ours.special_id("hello") is None
