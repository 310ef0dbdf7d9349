"""A program lowered to ONNX Runtime: runs on torch tensors, saves to one folder."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch

from graphwright.backends.base import Artifact, Compiled
from graphwright.backends.onnxruntime.adapters import Switch, write_adapter
from graphwright.backends.onnxruntime.by_row import run_by_row, takes_whole
from graphwright.backends.onnxruntime.genai import write_client_files
from graphwright.backends.onnxruntime.runtime import SessionSettings, open_session, run_session
from graphwright.backends.onnxruntime.saved import read_record
from graphwright.backends.onnxruntime.shared_cache import runner_of
from graphwright.ir.atomic import replacing, write_atomically
from graphwright.ir.causes import innermost
from graphwright.ir.errors import ArgumentError, GraphwrightError, ModelError
from graphwright.ir.generation.folder import with_tokenizer
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.program import bind_inputs
from graphwright.ir.signature import Signature, rebuild

FILE = "model.onnx"
ADAPTERS = "adapters"
"""Folder of the adapters that a model takes."""

DATA = "model.onnx.data"
"""Weights, when they are too large for the model file."""


class OnnxCompiled(Compiled):
    """An ONNX model with its session.

    Attributes:
        model: serialized model, or the path of one with its weights beside it.
        signature: inputs, outputs and structure, as the program's.
        session: ONNX Runtime's session.
        switch: the adapters that it takes; None where it takes none.
        generation: the record of a decoder with a cache; None for others.
        shares_cache: whether past and present may be one buffer.
        shipped: adapters that `save` writes beside the model, by name.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        model: bytes | Path,
        signature: Signature,
        session: onnxruntime.InferenceSession,
        notes: Mapping[str, Any],
        keep: TemporaryDirectory[str] | None = None,
    ) -> None:
        super().__init__(notes)
        self.switch: Switch | None = None
        self.generation: Generation | None = None
        self.shares_cache = False
        self.shipped: Mapping[str, Mapping[str, Any]] = {}
        self._run_options: onnxruntime.RunOptions | None = None
        self.model = model
        self.signature = signature
        self.session = session
        if keep is not None:
            weakref.finalize(self, keep.cleanup)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Runs it on torch tensors; the result is structured like the model's own output.

        Raises:
            ArgumentError: inputs that do not fit the signature.
        """
        given = {spec.name for spec in self.signature.inputs[: len(inputs)]}
        left_out = {n: t for n, t in self.defaults.items() if n not in given}
        flat = bind_inputs(self.signature, inputs, {**left_out, **named})
        return rebuild(self.signature.structure, self.run_flat(flat))

    def run_flat(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Flat outputs for one tensor per input, unchecked.

        A decoder whose rows lie compact in its cache runs other batches row by row.
        """
        record = self.generation if self.shares_cache else None
        if record is None or takes_whole(record, self.signature, inputs):
            return self._run_whole(inputs)
        return run_by_row(self._run_whole, record, self.signature, inputs)

    def _run_whole(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return run_session(self.session, self.signature, inputs, self._run_options)

    def use_adapter(self, path: str | Path | None) -> None:
        """Runs with the adapter of a file from now on; with the model's own when None.

        Raises:
            ArgumentError: the model takes no adapters, or not this one.
        """
        if path is None:
            self._run_options = None
            return
        if self.switch is None:
            raise ArgumentError("the model takes no adapters",
                                fix="Lower it with `adapters: switchable`.")  # fmt: skip
        self._run_options = self.switch.options(Path(path))

    def runner(self) -> Runner:
        """Runs the decoder over a cache of its own; every runner shares this session.

        Past and present are one buffer where every attention writes its cache in place; else they
        are joined anew at every step.

        Raises:
            ArgumentError: the model has no cache.
        """
        if self.generation is None:
            raise ArgumentError(
                "this artifact has no cache, and does not generate",
                fix="Lower a model that was loaded with `task: generation`.",
            )
        return runner_of(
            self.session, self.signature, self.generation, shares_cache=self.shares_cache
        )

    def save(self, folder: str | Path) -> Artifact:
        """Writes `model.onnx` (and `model.onnx.data` when the weights are large).

        Beside a decoder with a cache stand its tokenizer and what other clients read.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / FILE]
        if isinstance(self.model, bytes):
            write_atomically(folder / FILE, self.model)
        else:
            data = self.model.parent / DATA
            copies = [(data, DATA)] if data.is_file() else []  # weights may lie in the model
            for source, target in [*copies, (self.model, FILE)]:
                with source.open("rb") as old, replacing(folder / target) as new:
                    shutil.copyfileobj(old, new, 1 << 24)
            written += [folder / target for _, target in copies]
        for name, factors in self.shipped.items():
            assert self.switch is not None
            written.append(folder / ADAPTERS / f"{name}.onnx_adapter")
            write_adapter(written[-1], factors, self.switch.base)
        notes: list[str] = []
        if self.generation is not None:
            files, notes = write_client_files(
                self.generation, self.signature, folder, FILE, shared=self.shares_cache
            )
            written += files
        size = sum(file.stat().st_size for file in written)
        return Artifact(self.backend, folder / FILE, size, tuple(notes))


def load(path: str | Path, settings: SessionSettings | None = None) -> OnnxCompiled:
    """Opens a saved artifact: the folder, or its `model.onnx`.

    Raises:
        ModelError: the file is no artifact of ours, or damaged.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    record = read_record(path)
    try:
        session = open_session(path, settings or SessionSettings())
    except GraphwrightError:
        raise
    except Exception as error:  # the runtime has a type for each of its failures
        raise ModelError(
            "ONNX Runtime cannot open this artifact", where=str(path), details=(innermost(error),)
        ) from error
    compiled = OnnxCompiled(path, record.signature, session, {})
    compiled.switch = record.switch
    if record.generation is not None:
        compiled.generation = with_tokenizer(record.generation, path.parent)
    compiled.shares_cache = record.shares_cache
    return compiled
