"""The content of `report.json`. Keys declared here are stable; further ones may be added."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Figures(_Part):
    """Distance between two sets of outputs; a figure that is not finite is None.

    `snr_db: None` means no error when `max_abs` is 0, and a broken output otherwise.
    """

    max_abs: float | None
    relative: float | None
    cosine: float | None
    snr_db: float | None


class ModelPart(_Part):
    """The model that was given."""

    source: str
    sha256: str
    parameters: int
    weight_bytes: int
    macs: int | None
    """Multiply-accumulates of one run at the example sizes."""


class PassPart(_Part):
    """One pass of the chain; `error` is against the program before it."""

    id: str
    options: dict[str, Any]
    contract: str
    seconds: float
    peak_rss_bytes: int
    estimated: Estimate | None = None
    error: Figures
    decode: float | None = None
    """Of a decoder with a cache: relative error of its tokens one at a time against the same text
    at once, by the program behind the pass."""
    actions: list[tuple[str, str, str, bool]] = []
    """(layer, what it is now, remark, whether it changed): one per layer looked at."""
    metrics: dict[str, float | None] = {}
    part: str = ""
    """Part of a model of several programs; empty otherwise."""
    skipped: str = ""
    """Why it did nothing to this part: its layers are in others."""


class ArtifactPart(_Part):
    """One file or folder that was written; `path` is relative to the report."""

    backend: str
    path: str
    file_bytes: int
    part: str = ""
    fidelity: Figures | None = None
    """Distance of its outputs from the original model's; None for a checkpoint."""
    decode: float | None = None
    """As of a pass."""


class ResultPart(_Part):
    """The program after all passes, and what was made of it."""

    parameters: int
    weight_bytes: int
    macs: int | None
    artifacts: list[ArtifactPart]


class EvaluationPart(_Part):
    """The metric of the spec's `evaluate` section."""

    metric: str
    before: float | None
    after: float | None
    drop: float | None = None


class LatencyPart(_Part):
    """Median time of one call of the original and of an artifact, measured in alternation."""

    backend: str
    device: str
    threads: int
    part: str = ""
    before_ms: float
    after_ms: float
    speedup: float


class RequirePart(_Part):
    """A bound of the spec's `require` section."""

    name: str
    bound: float
    measured: float | None
    met: bool


class LayerPart(_Part):
    """A layer of the original: what it costs before and after, and the error at its output."""

    name: str
    kind: str
    node: str
    part: str = ""
    macs: int | None
    parameters: int
    weight_bytes: int
    weight_bytes_after: int | None
    relative: float | None
    """||a - b|| / ||a|| of its output, everything before it changed too; None if it is gone."""


class SizePart(_Part):
    """One of several programs that a model is, before and after."""

    parameters: int
    parameters_after: int
    weight_bytes: int
    weight_bytes_after: int
    macs: int | None
    macs_after: int | None


class TrialPart(_Part):
    """A candidate of a search."""

    number: int
    values: dict[str, Any]
    """By place of the spec, what the candidate has there."""
    measured: dict[str, float | None]
    require: list[RequirePart]
    met: bool
    """Whether it gave a result that keeps all bounds."""
    missed_by: float
    """Sum over the bounds of how far each is missed, relative to itself."""
    seconds: float
    failed: str
    """Why it gave no result; empty where it gave one."""
    same_as: int | None
    """Number of an earlier trial that was the same candidate."""


class SearchPart(_Part):
    """The search that this result won."""

    strategy: str
    seed: int
    objective: list[str]
    trials: list[TrialPart]
    winner: int
    why: str
    front: list[int]
    """Trials that keep all bounds and that no other such trial beats in every measure."""
    seconds: float


class Estimate(_Part):
    """What a stage was thought to take before it ran."""

    seconds: float
    peak_rss_bytes: int
    disk_bytes: int = 0


class StagePart(_Part):
    """A stage of the run: what it took, and what was estimated."""

    name: str
    """`0 quantize.int8` is the first pass, `0 check` its check."""
    part: str = ""
    seconds: float
    processor_seconds: float
    """Of this process; less than `seconds` where it waited for others."""
    peak_rss_bytes: int
    estimated: Estimate | None = None


class Report(_Part):
    """`report.json`."""

    version: str
    model: ModelPart
    passes: list[PassPart]
    result: ResultPart
    fidelity: Figures
    evaluation: EvaluationPart | None
    latency: list[LatencyPart]
    layers: list[LayerPart] = []
    parts: dict[str, SizePart] = {}
    """Of a model of several programs: sizes of each. The rows above name the part they are of."""
    stages: list[StagePart] = []
    """In the order in which they ran; `estimated` as `optimize --plan` does."""
    notes: dict[str, Any] = {}
    """Notes of each backend: fusions, kernel counts, nodes that stayed, with the reason."""
    require: list[RequirePart] = []
    search: SearchPart | None = None
    """Of a spec with a section `search`."""
    warnings: list[str] = []
    code: list[str] = []
    """Code of the user's own that ran because the spec or a flag names it."""
    files: list[str] = []
    """Files of the result, relative to its folder; others in it are the user's, and are kept."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
