"""The artifacts of a model that is several programs: a folder with one per part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.backends.base import Compiled
from graphwright.backends.opening import open_artifact
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.generation.text import TOKENIZER
from graphwright.ir.parts import INDEX

if TYPE_CHECKING:
    from graphwright.ir.generation.decode import Completion
    from graphwright.ir.generation.encoder_decoder import EncoderDecoder


class CompiledParts(Mapping[str, Compiled]):
    """Artifacts by the name of the part, in the order in which they first run.

    Attributes:
        folder: that they lie in; None where they were just made.
    """

    def __init__(self, parts: Mapping[str, Compiled], folder: Path | None = None) -> None:
        self._parts = dict(parts)
        self.folder = folder

    def __getitem__(self, name: str) -> Compiled:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @cached_property
    def language_model(self) -> EncoderDecoder:
        """An encoder and a decoder that generate together.

        Raises:
            ArgumentError: the parts are none.
        """
        from graphwright.ir.generation.encoder_decoder import EncoderDecoder

        found = {part.generation.kind: part for part in self.values() if part.generation}
        encoder, decoder = found.get("encoder"), found.get("cross_decoder")
        if encoder is None or decoder is None:
            raise ArgumentError(f"the parts {list(self)} are no encoder and decoder")
        assert encoder.generation is not None
        assert decoder.generation is not None
        has_text = self.folder is not None and (self.folder / TOKENIZER).is_file()
        return EncoderDecoder(
            encoder, decoder, (encoder.generation, decoder.generation),
            self.folder if has_text else None,
        )  # fmt: skip

    def generate(self, prompts: Any, **options: Any) -> Completion | list[Completion]:
        """Generates what belongs to each source; see `EncoderDecoder.generate`."""
        return self.language_model.generate(prompts, **options)


def open_parts(path: Path) -> CompiledParts | None:
    """The artifacts of a folder with an index of parts; None for any other place.

    Raises:
        ModelError: the index is damaged, or a part is missing.
    """
    if not (path / INDEX).is_file():
        return None
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        names = [str(name) for name in index["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError("the index of parts is damaged", where=str(path / INDEX)) from error
    parts: dict[str, Compiled] = {}
    for name in names:
        found = open_artifact(path / name) if name.isidentifier() else None
        if found is None:
            raise ModelError(f"there is no artifact of the part {name!r}", where=str(path))
        parts[name] = found
    return CompiledParts(parts, path)
