"""The formats that a spec's `export` section names, and their options."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import Field

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options

if TYPE_CHECKING:
    from graphwright.ir.files.export_checkpoint import Format
    from graphwright.ir.program import Program


class ExportOptions(Options):
    """Options of every format."""

    folder: Annotated[str, Field(pattern=r"^\w[\w-]*$")] | None = None
    """Name of the folder below the output folder; that of the format when left out."""


class Export:
    """A format that checkpoints are written in."""

    name: ClassVar[str]
    Options: ClassVar[type[ExportOptions]] = ExportOptions

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder or self.name

    def check(self, program: Program, passes: Iterable[str]) -> None:
        """Looks at the traced program, before `passes` run.

        Raises:
            ModelError: the format will have nothing to write.
        """
        from graphwright.ir.files.export_checkpoint import refuse_without_codes

        refuse_without_codes(program, cast("Format", self.name), passes)

    def write(self, program: Program, out: Path, like: Path | None) -> list[str]:
        """Writes the checkpoint below `out`; returns what the user should know.

        Raises:
            ModelError: the format cannot hold the program.
        """
        from graphwright.ir.files.export_checkpoint import export_checkpoint

        return export_checkpoint(program, out / self.folder, cast("Format", self.name), like=like)


class Gptq(Export):
    """A checkpoint of GPTQ: linear layers in blocks of 2, 3, 4 or 8 bits."""

    name = "gptq"


class Awq(Export):
    """A checkpoint of AWQ, version gemm: linear layers in blocks of 4 bits."""

    name = "awq"


class CompressedTensors(Export):
    """A checkpoint of compressed-tensors: linear layers in blocks of 2 to 8 bits."""

    name = "compressed-tensors"


class Safetensors(Export):
    """The weights as floats by the names of the model's own code."""

    name = "safetensors"


class GgufOptions(ExportOptions):
    """Options of the format gguf."""

    floats: Literal["f16", "f32", "q8_0"] = "f16"
    """Type of the matrices that are in no codes: half or single precision, or 8 bits in blocks of
    32, rounded to nearest."""


class Gguf(Export):
    """A file of llama.cpp: layers in blocks of 32 keep their codes, as Q4_0, Q4_1, Q5 or Q8_0."""

    name = "gguf"
    Options = GgufOptions

    def __init__(
        self, folder: str | None = None, floats: Literal["f16", "f32", "q8_0"] = "f16"
    ) -> None:
        super().__init__(folder)
        self.floats = floats

    def check(self, program: Program, passes: Iterable[str]) -> None:
        """Nothing is known before: floats can be written too."""

    def write(self, program: Program, out: Path, like: Path | None) -> list[str]:
        from graphwright.ir.files.gguf.export import export_gguf

        return export_gguf(program, out / self.folder, like, self.floats)


class PeftOptions(ExportOptions):
    """Options of the format peft."""

    adapter: str = "default"
    """Name of the adapter to write."""


class Peft(Export):
    """An adapter in a folder of Hugging Face PEFT, for the original model."""

    name = "peft"
    Options = PeftOptions

    def __init__(self, folder: str | None = None, adapter: str = "default") -> None:
        super().__init__(folder)
        self.adapter = adapter

    def check(self, program: Program, passes: Iterable[str]) -> None:
        from graphwright.ir.adapters.record import adapters

        if not adapters(program) and not any(name.startswith("adapt.") for name in passes):
            raise ModelError(
                "export peft: the program has no adapter, and no pass of the chain puts one in",
                fix="Put adapt.lora or another adapter into the passes.",
            )
        self.base = program

    def write(self, program: Program, out: Path, like: Path | None) -> list[str]:
        from graphwright.ir.adapters.save import save_adapter

        save_adapter(program, out / self.folder, self.adapter, base=self.base)
        return []


EXPORTS: dict[str, type[Export]] = {
    cls.name: cls for cls in (Gptq, Awq, CompressedTensors, Gguf, Peft, Safetensors)
}
"""By the name that a spec says."""
