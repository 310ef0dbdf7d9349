"""One lowering: which steps work, and the checks that every attempt has to pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
import onnxruntime
import torch

from graphwright.backends.onnxruntime.attempt import Attempt, Outputs, quantizers
from graphwright.backends.onnxruntime.cached_cases import cached_cases
from graphwright.backends.onnxruntime.check import (
    Case,
    Differs,
    check_cases,
    compare_outputs,
    tolerance_for,
)
from graphwright.backends.onnxruntime.compiled import DATA, FILE
from graphwright.backends.onnxruntime.diagnose import failure
from graphwright.backends.onnxruntime.drawn import drawn_cases
from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.forced import Taps, on_codes
from graphwright.backends.onnxruntime.integer import integer_kernels, quantized_layers
from graphwright.backends.onnxruntime.integer_lstm import to_integers
from graphwright.backends.onnxruntime.optimized import OptimizedGraph
from graphwright.backends.onnxruntime.options import OnnxRuntimeOptions
from graphwright.backends.onnxruntime.ragged import check_rows
from graphwright.backends.onnxruntime.rounded import raise_level
from graphwright.backends.onnxruntime.runtime import (
    SessionSettings,
    open_and_count,
    open_session,
    run_session,
)
from graphwright.backends.onnxruntime.sparse import store_sparse
from graphwright.backends.onnxruntime.steps.blocks import EXACT
from graphwright.backends.onnxruntime.steps.catalog import Step
from graphwright.backends.onnxruntime.steps.int8 import REPLACED
from graphwright.backends.onnxruntime.steps.leftovers import has_compressed_weights
from graphwright.backends.onnxruntime.ties import with_settled_ties
from graphwright.backends.onnxruntime.translate import translate_with_values
from graphwright.backends.onnxruntime.written import is_apart, save_apart, weight_bytes
from graphwright.ir.causes import innermost
from graphwright.ir.check.exact import SMALL_MULTIPLE
from graphwright.ir.edit import Editor
from graphwright.ir.errors import LoweringError
from graphwright.ir.generation.record import Generation
from graphwright.ir.lack import raise_lack
from graphwright.ir.program import Program

MOST_GROWTH, SLACK = 1.3, 1 << 16
"""Bytes of a model's weights, at most, for each byte of a program whose weights are compressed;
and bytes for constants of its steps."""


class Job:
    """One lowering: the program, its expected outputs, and the folder for large weights.

    Attributes:
        source: what is translated.
        program: what the models are compared with: `source`, with its ties settled.
    """

    def __init__(
        self, program: Program, options: OnnxRuntimeOptions, folder: TemporaryDirectory[str]
    ) -> None:
        self.source = program
        self.program = with_settled_ties(program)
        self.options = options
        self.folder = folder
        self.settings = SessionSettings(options.provider, options.threads, EXACT)
        self.settings.providers()
        self.generation = Generation.of_decoder(program)
        self.cases = self._cases()
        self.bound = tolerance_for(program, options.tolerance)
        self.quantized = quantized_layers(program)

    def _cases(self) -> list[Case]:
        if self.generation is None or not self.generation.layers:
            return [*check_cases(self.program), *drawn_cases(self.program)]
        return cached_cases(self.program, self.generation)

    def best(self, steps: list[Step]) -> tuple[Attempt, dict[str, str]]:
        """The model with as many steps as work, and the reason for each that does not.

        Raises:
            LoweringError: the model is wrong without any step.
        """
        try:
            return self.attempt(steps), {}
        except Differs as error:
            if not steps:
                raise self.failure(error) from error
        return self.one_by_one(steps)

    def attempt(self, steps: list[Step]) -> Attempt:
        """Applies the steps, translates, and checks.

        Raises:
            Differs: the model does not load, or computes something else.
        """
        made = Attempt(self.source, {})
        with torch.no_grad():
            editor = Editor(made.program, by="lower")
            for step in steps:
                editor = self._apply(step, made, editor)
            model = self._translate(made)
            self._check_size(model)
            self._check(model, made)
            check_rows(self.program, made, self.bound)
            self._round_activations(model, made)
        return made

    def _apply(self, step: Step, made: Attempt, editor: Editor) -> Editor:
        """Applies a step; returns the editor for the next one: the same while nothing changed."""
        editor.by = f"lower.{step.name}"
        try:
            count = step(editor, self.options)
            program = editor.finish(propagate=False)
        except Exception as error:
            raise_lack(error)
            raise Differs(f"step {step.name} failed: {error!r}") from error
        made.program = program
        if count:
            made.applied[step.name] = made.applied.get(step.name, 0) + count
        return Editor(made.program, by="lower") if editor.changed else editor

    def _translate(self, made: Attempt) -> ir.Model:
        """The model, and in `made.values` the results of the nodes that the checks look at."""
        try:
            model, values = translate_with_values(made.program, self.options.opset)
        except Untranslatable as why:
            from graphwright.backends.onnxruntime.stock import export_with_torch

            made.translator = f"torch.onnx.export, for {why}"
            model, made.values = export_with_torch(
                made.program, self.options.opset, why, self._watched(made)
            )
            return model
        made.translator = "direct"
        made.values = {node.name: value for node, value in values.items()}
        return model

    def _watched(self, made: Attempt) -> list[str]:
        """Nodes of the lowered program whose values the checks ask for."""
        taps = [name for names in quantizers(made.program).values() for name in names]
        return [*dict.fromkeys([*taps, *self._layer_nodes(made).values()])]

    def _layer_nodes(self, made: Attempt) -> dict[str, str]:
        """Node of each quantized layer -> node that computes it in the lowered program."""
        there = {node.name for node in made.program.graph.nodes}
        replaced = made.program.facts.get(REPLACED, {})
        nodes = [layer.node.name for layer in self.quantized]
        return {n: replaced.get(n, n) for n in nodes if replaced.get(n, n) in there}

    def _check(self, model: ir.Model, made: Attempt) -> None:
        """Checks the model as it is written, then as ONNX Runtime's optimizer rewrites it."""
        made.model = self._write(model, made)
        try:
            onnx.checker.check_model(
                made.model if isinstance(made.model, bytes) else str(made.model)
            )
            plain = self._check_plain(made)
            made.session, outputs, made.kernels = open_and_count(
                made.model, self.settings, self.program.signature, self.cases[0].inputs,
                self._optimized if self.quantized or quantizers(made.program) else None,
            )  # fmt: skip
        except Differs:
            raise
        except Exception as error:
            raise_lack(error)
            raise Differs(f"ONNX Runtime refuses the model: {innermost(error)}") from error
        made.exact = made.session
        try:
            self._check_session(made, made.session, outputs, plain)
        except Differs as error:
            whose = "; ONNX Runtime's graph optimizations make it differ" if plain else ""
            raise Differs(f"{error}{whose}", error.inputs) from error

    def _check_plain(self, made: Attempt) -> list[Outputs]:
        """Outputs of all cases with all graph optimizations off; none where that does not run.

        Raises:
            Differs: it runs and is not.
        """
        path = Path(self.folder.name) / "plain.onnx"
        if isinstance(made.model, bytes):
            path.write_bytes(made.model)
        else:
            path = made.model
        graph = OptimizedGraph(path)
        taps = self._taps(made, graph)
        names = taps.names if taps else ()
        found = []
        for case in self.cases:
            try:
                outputs = graph.read(names, self.settings, self.program.signature, case.inputs)[1]
            except Exception as error:
                raise_lack(error)
                made.unoptimized = innermost(error)
                return []
            self._compare(case, outputs, made, taps)
            found.append(outputs)
        made.errors.clear()
        return found

    def _check_session(
        self,
        made: Attempt,
        session: onnxruntime.InferenceSession,
        outputs: Outputs,
        plain: list[Outputs],
    ) -> None:
        """The session that is handed over against the program and the model as it was written."""
        taps = None
        if self.quantized or quantizers(made.program):
            graph = OptimizedGraph(self._optimized)
            nodes = self._layer_nodes(made)
            values = {n: made.values[m] for n, m in nodes.items() if m in made.values}
            if self.quantized:
                made.integer = integer_kernels(self.quantized, values, graph)
            taps = self._taps(made, graph)
        for index, case in enumerate(self.cases):
            if index:
                try:
                    outputs = run_session(session, self.program.signature, case.inputs)
                except Exception as error:
                    raise_lack(error)
                    raise Differs(f"the model fails {case}: {innermost(error)}") from error
            self._compare(case, outputs, made, taps)
            if plain and taps is None:  # codes of quantizers may differ by one, and do not matter
                same = replace(case, expected=plain[index])
                compare_outputs(self.program, same, outputs, self.bound, SMALL_MULTIPLE)

    def judge(self, made: Attempt) -> Callable[[Case], float]:
        """Runs the checked session on a further case; `_judge`s what comes out."""
        session = made.exact
        assert session is not None
        graph = OptimizedGraph(self._optimized) if quantizers(made.program) else None
        taps = None if graph is None else self._taps(made, graph)
        return lambda case: self._judge(
            case, run_session(session, self.program.signature, case.inputs), taps
        )

    def _round_activations(self, model: ir.Model, made: Attempt) -> None:
        """Goes over to kernels that round activations as they come, behind the sharp check."""
        # A session holds all weights in its kernels' own layout: of a large model, one at a time.
        is_closed = isinstance(made.model, Path) and self.generation is not None
        if is_closed:
            made.session = made.exact = None
        settings = raise_level(self.program, self.options, self.settings, model, made, self.cases)
        changed = None if settings is None else model
        settings = settings or self.settings
        integer = to_integers(self.program, settings, changed or model, made, self.cases)
        changed = integer or changed
        if changed is None:
            if is_closed:
                made.session = open_session(made.model, self.settings)
            return
        made.model = self._write(changed, made)
        case = self.cases[0]
        made.session, outputs, made.kernels = open_and_count(
            made.model, settings, self.program.signature, case.inputs
        )
        off = compare_outputs(self.program, case, outputs, float("inf"))
        for found in (made.products, made.lstms):
            if "largest_error" in found:
                found["outputs"] = off

    def _check_size(self, model: ir.Model) -> None:
        """A compressed weight must not have come out as floats."""
        stored = sum(tensor.nbytes for tensor in self.program.state.values())
        written = weight_bytes(model)
        if has_compressed_weights(self.program) and written > MOST_GROWTH * stored + SLACK:
            raise Differs(f"its weights take {written:,} bytes, the program's {stored:,}")

    def _taps(self, made: Attempt, graph: OptimizedGraph) -> Taps | None:
        """The places of a program's quantizers in a graph; None for a program without."""
        found = quantizers(made.program)
        if not found:
            return None
        marked = {q: [made.values[name] for name in names] for q, names in found.items()}
        return Taps(marked, made.program.state, graph)

    def _compare(self, case: Case, outputs: Outputs, made: Attempt, taps: Taps | None) -> None:
        error = self._judge(case, outputs, taps)
        inputs = {"inputs": case.drawn} if case.drawn else {}
        made.errors.append({"sizes": case.sizes, **inputs, "relative": error})

    def _judge(self, case: Case, outputs: Outputs, taps: Taps | None) -> float:
        """The relative error of outputs, where there are quantizers on the session's own codes."""
        if taps is not None:
            shown, codes = taps.run(self.program, self.settings, case.inputs)
            # What was looked into must be what the session computes.
            same = replace(case, expected=shown, reference=None)
            compare_outputs(self.program, same, outputs, self.bound)
            case = on_codes(self.program, case, codes)
        return compare_outputs(self.program, case, outputs, self.bound)

    @property
    def _optimized(self) -> Path:
        """File to which the session writes the graph that it runs."""
        return Path(self.folder.name) / "optimized.onnx"

    def _write(self, model: ir.Model, made: Attempt) -> bytes | Path:
        """Serialized in memory, or in a folder with the weights apart when they are large."""
        if not is_apart(model, self.options.external_data_mb):
            proto = ir.to_proto(model)
            if self.options.sparse_initializers:
                made.sparse = store_sparse(proto)
            content: bytes = proto.SerializeToString()
            return content
        return save_apart(model, Path(self.folder.name) / FILE, DATA)

    def one_by_one(self, steps: list[Step]) -> tuple[Attempt, dict[str, str]]:
        """Adds one step at a time and leaves out each that breaks the model.

        Raises:
            LoweringError: the model is wrong without any step.
        """
        kept: list[Step] = []
        dropped: dict[str, str] = {}
        try:
            best = self.attempt(kept)
        except Differs as error:
            raise self.failure(error) from error
        for step in steps:
            try:
                best = self.attempt([*kept, step])
                kept.append(step)
            except (Differs, LoweringError) as error:
                dropped[step.name] = str(error)
        return best, dropped

    def failure(self, error: Differs) -> LoweringError:
        """The error for a model that is wrong without any step."""
        return failure(self.program, error, self.options.opset, self.settings, self.bound)
