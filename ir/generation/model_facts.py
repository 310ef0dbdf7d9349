"""What a model's configuration files say about generating: special tokens, lengths, sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphwright.ir.errors import ModelError
from graphwright.ir.files.detect import read_json
from graphwright.ir.generation.rotary import DYNAMIC

LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Keys of a configuration under which the longest text stands, by architecture."""

NO_SAMPLING = ("transformers_version", "_from_model_config", "use_cache", "max_length")
"""Keys of generation_config.json that say nothing about how tokens are chosen, beside token ids and
what is put out."""


@dataclass(frozen=True)
class ModelFacts:
    """See the fields of `Generation`, whose these are.

    Attributes:
        notes: what the user should know.
    """

    context_length: int | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    sliding_window: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any, folder: str | Path | None = None) -> ModelFacts:
        """From the model's own configurations, and the files of its folder where there are any."""
        config = model.config
        generation = _plain(getattr(model, "generation_config", None))
        files = [] if folder is None else [
            _file(Path(folder) / name) for name in ("generation_config.json", "config.json")
        ]  # fmt: skip
        tokenizer = {} if folder is None else _tokenizer_ids(Path(folder))
        sources = [generation, *files, _plain(config), tokenizer]
        length, notes = _context_length(config)
        ends = (n for source in sources for n in _ids(source.get("eos_token_id")))
        return cls(
            context_length=length,
            bos=_first(sources, "bos_token_id"),
            eos=tuple(dict.fromkeys(ends)),
            pad=_first(sources, "pad_token_id"),
            sliding_window=_window(config),
            sampling={k: v for k, v in generation.items() if _is_sampling(k) and v is not None},
            notes=notes,
        )

    def as_fields(self) -> dict[str, Any]:
        """Arguments of `Generation`."""
        return {name: value for name, value in vars(self).items() if name != "notes"}


def _is_sampling(key: str) -> bool:
    return not (key in NO_SAMPLING or key.endswith("_token_id") or key.startswith("output_"))


def _context_length(config: Any) -> tuple[int | None, tuple[str, ...]]:
    """The longest text; the shorter one of a model that changes its frequencies on the way.

    Such a model (Phi-3 with `longrope`) has one set of rotary factors for texts within its first
    length and another beyond, so that a cache filled with the one does not serve the other.
    """
    found = next((n for key in LENGTHS if (n := getattr(config, key, None))), None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    short = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if rope.get("rope_type", rope.get("type")) == "longrope" and short and found and short < found:
        note = (
            f"texts are limited to {short} tokens: beyond, the model's rotary factors are others, "
            "and a cache filled with the first ones would be wrong"
        )
        return int(short), (note,)
    if DYNAMIC in str(rope.get("rope_type", rope.get("type"))) and found:
        note = (
            f"texts are limited to {found} tokens: beyond, the model's rotary frequencies change "
            "with every length (rope_type: dynamic), and no cache of keys is right"
        )
        return int(found), (note,)
    return None if found is None else int(found), ()


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    return int(window) if kinds is None or "sliding_attention" in kinds else None


def _tokenizer_ids(folder: Path) -> dict[str, Any]:
    """Ids of the special tokens that tokenizer_config.json names by their text."""
    settings, tokens = _file(folder / "tokenizer_config.json"), _file(folder / "tokenizer.json")
    known = {
        entry["content"]: entry["id"] for entry in tokens.get("added_tokens", ())
        if isinstance(entry, dict) and {"content", "id"} <= set(entry)
    }  # fmt: skip
    found = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text in known:
            found[f"{key}_id"] = known[text]
    return found


def _first(sources: Iterable[Mapping[str, Any]], key: str) -> int | None:
    """The first whole number under a key; of a list, its first."""
    return next((n for source in sources for n in _ids(source.get(key))), None)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [n for n in values if isinstance(n, int) and not isinstance(n, bool) and n >= 0]


def _plain(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    found: dict[str, Any] = config.to_dict()
    return found


def _file(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no such file, or it cannot be read."""
    try:
        found = read_json(path) if path.is_file() else {}
    except ModelError:
        return {}
    return found if isinstance(found, dict) else {}
