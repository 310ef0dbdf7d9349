"""Sessions: providers, threads, running on torch tensors, and which kernels really ran."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch

from graphwright.backends.onnxruntime.names import onnx_forms
from graphwright.ir.errors import LoweringError
from graphwright.ir.signature import Signature

ERRORS_ONLY = 4
"""ONNX Runtime's severity `fatal`: its failures reach us as exceptions anyway."""

LEVEL_ENTRY = "session.qdq_matmulnbits_accuracy_level"
WEIGHTS_ENTRY = "session.optimized_model_external_initializers_file_name"
APART_ENTRY = "session.optimized_model_external_initializers_min_size_in_bytes"


@dataclass(frozen=True)
class SessionSettings:
    """The settings of a session; they go into the notes.

    Attributes:
        provider: `cpu`, `cuda` or `auto`.
        threads: within an operator.
        accuracy_level: of products that the runtime itself fuses from DequantizeLinear + MatMul;
            its own default (4) when None.
    """

    provider: str = "cpu"
    threads: int = 0
    accuracy_level: int | None = None

    def providers(self) -> list[str]:
        """Execution providers in order of preference.

        Raises:
            LoweringError: CUDA is asked for and cannot be used here.
        """
        usable = (
            "CUDAExecutionProvider" in onnxruntime.get_available_providers()
            and torch.cuda.is_available()
        )
        if self.provider == "cuda" and not usable:
            raise LoweringError(
                "provider cuda: ONNX Runtime finds no CUDA device here",
                fix="Use provider cpu, or auto.",
            )
        cuda = ["CUDAExecutionProvider"] if usable and self.provider != "cpu" else []
        return [*cuda, "CPUExecutionProvider"]

    def thread_count(self) -> int:
        """Threads within an operator."""
        return self.threads or torch.get_num_threads()


def open_session(
    model: bytes | Path,
    settings: SessionSettings,
    *,
    profile: Path | None = None,
    optimized: Path | None = None,
    optimize: bool = True,
) -> onnxruntime.InferenceSession:
    """An inference session on a model in memory or on disk.

    Args:
        model: serialized model, or the path of one whose weights lie beside it.
        settings: providers and threads.
        profile: prefix of the profile to write until `end_profiling` is called.
        optimized: where to write the graph that the session runs; its large weights go beside it.
        optimize: whether the runtime may rewrite the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.thread_count()
    options.log_severity_level = ERRORS_ONLY
    if settings.accuracy_level is not None:
        options.add_session_config_entry(LEVEL_ENTRY, str(settings.accuracy_level))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        for key, value in ((WEIGHTS_ENTRY, f"{optimized.name}.data"), (APART_ENTRY, str(1 << 16))):
            options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=settings.providers())


def feeds_for(
    session: onnxruntime.InferenceSession, signature: Signature, inputs: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Arrays by name, for the inputs that the session has."""
    wanted = {item.name for item in session.get_inputs()}
    return {
        name: tensor.detach().cpu().contiguous().numpy()
        for spec, tensor in zip(signature.inputs, inputs, strict=True)
        for name in onnx_forms(spec.name)
        if name in wanted
    }


def run_session(
    session: onnxruntime.InferenceSession,
    signature: Signature,
    inputs: Sequence[torch.Tensor],
    options: onnxruntime.RunOptions | None = None,
) -> tuple[torch.Tensor, ...]:
    """Flat outputs for flat inputs, as torch tensors on the device of the first input."""
    results = session.run(None, feeds_for(session, signature, inputs), options)
    device = inputs[0].device if inputs else torch.device("cpu")
    return tuple(torch.from_numpy(array).to(device) for array in results)


def open_and_count(
    model: bytes | Path,
    settings: SessionSettings,
    signature: Signature,
    inputs: Sequence[torch.Tensor],
    optimized: Path | None = None,
) -> tuple[onnxruntime.InferenceSession, tuple[torch.Tensor, ...], dict[str, int]]:
    """Opens a session, runs it once, and counts the kernels that the run called, by op type.

    Args:
        model, settings, optimized: as for `open_session`.
        signature, inputs: of the run.
    """
    with TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        session = open_session(model, settings, profile=profile, optimized=optimized)
        try:
            outputs = run_session(session, signature, inputs)
        finally:
            file = session.end_profiling()
        events = json.loads(Path(file).read_text())
    return session, outputs, _kernel_counts(events)


def _kernel_counts(events: list[dict[str, Any]]) -> dict[str, int]:
    names = {
        (event["args"]["op_name"], event["name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return dict(collections.Counter(kind for kind, _ in sorted(names)).most_common())
