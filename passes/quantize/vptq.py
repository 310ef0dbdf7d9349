"""quantize.vptq: 2 to 4 bit weights as indices into codebooks of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_codebook
from graphwright.ir.calibration.hessian import Hessian, hessian, inverse_factor, seen_or_even
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import CODABLE, STORED
from graphwright.ir.layers.products import Geometry, as_matrix, from_matrix, geometry, weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.layers.selectors import layers as find_layers
from graphwright.ir.options import Bounded, Rule, Targets
from graphwright.ir.program import Program
from graphwright.ir.stored.codebook import Vectors, rebuild_vectors
from graphwright.ir.stored.insert import Make
from graphwright.ir.stored.refusals import refusals
from graphwright.ir.tune import TuneOptions
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Action, Context, Need, Pass, Result
from graphwright.passes.quantize._low_bit.centroids import tune_centroids
from graphwright.passes.quantize._low_bit.coding import (
    insert,
    kept,
    layer_errors,
    output_error,
    uncalibrated,
)
from graphwright.passes.quantize._math.vptq import Size, VptqSettings, quantize
from graphwright.passes.quantize._math.vptq_sizes import sizes_for

RECIPE: dict[str, Any] = {
    "loss": "kl", "lr": 3e-4, "betas": (0.90, 0.95), "optimizer": "adam", "schedule": "constant",
}  # fmt: skip
"""Training of codebooks: that of PV-tuning's released code; the paper's own was not released."""

LEAST_ROWS = 16
"""Rows of calibration data below which H says too little: errors are then not spread."""

Centroids = Annotated[int, Field(ge=2, le=65536)]
Width = Annotated[int, Field(ge=1, le=64)]


class VptqOptions(Bounded, Targets):
    """Options of quantize.vptq."""

    rules = (
        Rule("residual_centroids", "residual_centroids != 1",
             "residual_centroids is 0 for none, or at least 2"),
        Rule("bits", "bits is None or (vector_length == 4 and centroids == 256 and "
                     "residual_centroids == 0 and outlier_percent == 0)",
             "bits chooses vector_length, centroids and residual_centroids for every layer, "
             "without outliers: leave these out"),
    )  # fmt: skip

    bits: Annotated[float, Field(ge=0.5, le=8)] | None = None
    """Bits per weight, all that is stored counted, in the place of the three options below: every
    layer then gets the vector length and codebooks of least expected error that take no more."""

    vector_length: Width = 4
    """Neighbouring outputs that one index stands for. 4 with 256 centroids suits layers of a few
    hundred to a few thousand outputs; large language models take 8 with 65536."""

    centroids: Centroids = 256
    """Vectors in a codebook. log2(centroids) / vector_length bits per weight, and the codebook."""

    residual_centroids: Annotated[int, Field(ge=0, le=65536)] = 0
    """Vectors in a second codebook for what the first leaves over; 0 for none."""

    outlier_percent: Annotated[float, Field(ge=0, le=50)] = 0.0
    """Share of the inputs, those with the largest activations, that get a codebook of their own."""

    outlier_vector_length: Width = 2
    """Vector length of the outliers' codebook."""

    outlier_centroids: Centroids = 256
    """Vectors in the outliers' codebook."""

    groups: Annotated[int, Field(ge=1)] = 1
    """Codebooks that the other inputs are spread over."""

    norm: bool = False
    """Shift and scale the weights of every input to [0, 1] first: 32 bits more for each input. The
    paper's example does; small models came out better without."""

    permute: bool = True
    """Quantize the inputs with the largest activations first, while there is most left to make up
    for it."""

    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it; raised tenfold up to three
    times where the Hessian is singular even so."""

    kmeans_iterations: Annotated[int, Field(ge=1)] = 100
    """Iterations of k-means, at most."""

    kmeans_tolerance: Annotated[float, Field(ge=0)] = 1e-5
    """K-means ends when its inertia falls by less than this share."""

    fit_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of conjugate gradients that fit the codebooks to the outputs once the indices are
    found; 0 leaves them as k-means gave them."""

    sequential: bool = True
    """Calibrate every layer on what the quantized layers before it give; else all layers on the
    activations of the program as it was, and as many at a time as there are jobs."""

    end_to_end: bool = False
    """Train codebooks and scales of all layers together at the end, indices as they are, to follow
    the model as it was: the paper's last step. Needs the spec's `training` section; how long it
    will take is measured and said before it begins."""

    tune: TuneOptions = TuneOptions(**RECIPE)
    """Options of this training. What is left out is as in `quantize.pv`."""

    def size(self, rows: int, columns: int) -> Size | None:
        """Of the codebooks of a matrix; None where `bits` are too few for any."""
        if self.bits is None:
            return Size(self.vector_length, self.centroids, self.residual_centroids)
        spent = 32 * (self.norm + self.permute) / rows
        return sizes_for(self.bits - spent, rows, columns, self.groups)

    def settings(self, size: Size) -> VptqSettings:
        """Sizes and options of a matrix."""
        return VptqSettings(
            size,
            Size(self.outlier_vector_length, self.outlier_centroids),
            self.outlier_percent,
            self.groups,
            self.norm,
            self.permute,
            self.kmeans_iterations,
            self.kmeans_tolerance,
            self.fit_steps,
        )


class Vptq(Pass[VptqOptions]):
    """Quantizes weights to 2 to 4 bits: vectors of outputs are looked up in codebooks.

    A weight is cut into vectors along its outputs. Codebooks are found by k-means, every vector
    weighed by H_jj of its input j, with H = mean of x x^T over the calibration data; then, input
    by input, every vector takes the nearest entry, and what this changes in the outputs is made up
    for by the inputs not yet quantized. A second codebook can hold what the first leaves over,
    and the inputs that matter most can have a codebook with shorter vectors. At the end the
    codebooks are fitted to the layer's outputs. Convolutions are quantized as products with their
    windows; activations and embedding tables stay as they are.

    Codebooks and scales are stored in float16 where that keeps them to 0.1%. In small layers they
    are a large part of what is stored: the bits per weight that are reported count everything.

    No runtime has a kernel for codebooks on a CPU: ONNX Runtime rebuilds the dense weight when a
    session is made, so that the file is small, and memory and speed are those of float.

    Source: Liu et al. 2024, "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large
    Language Models". The layer-wise tuning of centroids by gradient descent is here a linear
    least-squares fit; outliers are always the inputs with the largest H_jj, whatever the order.
    """

    contract = "lossy"
    takes = ("linear", "conv")
    codes = ("linear", "conv")
    stores_weights = True
    needs = "calibration"
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {("end_to_end", True): "training"}
    weights = "compressed"
    papers = ("P63",)
    after = ("cleanup.*", "prune.*", "quantize.smoothquant")

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.hessians(layers) + load.columns(layers)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        chosen = select(program, options.targets, CODABLE)
        products = [layer for layer in chosen if layer.kind not in STORED]
        refused = {
            layer: f"{uncalibrated(layer)} has no product to calibrate on"
            for layer in chosen
            if layer.kind in STORED
        }
        refused |= refusals(program, products, embeddings=False)
        for layer in products:
            shape = geometry(program, layer) if layer not in refused else None
            if shape is not None and shape.is_convolution and shape.groups > 1:
                refused[layer] = "a grouped convolution"
            elif shape is not None and options.size(*_matrix_shape(shape)) is None:
                refused[layer] = f"no codebook of its size fits {options.bits:g} bits per weight"
        layers, actions = kept(self.id, chosen, refused)
        solved = sweep(
            program, layers, context.batches, Lookups(options), context,
            follow="solved" if options.sequential else "program",
        )  # fmt: skip
        editor = Editor(program, by=self.id)

        def find(layer: Layer) -> tuple[Make, Action]:
            found = solved[layer.node.name]
            parts = [vectors_of(part) for part in found.parts or (found,)]
            make = rebuild_vectors(parts, weight_node(layer).meta["val"].dtype)
            return make, self._action(layer, found.info)

        actions += insert(editor, layers, find)
        result, metrics = editor.finish(), _metrics(list(solved.values()))
        if options.end_to_end:
            coded = [x for x in find_layers(result) if x.node.name in solved]
            result, history = tune_centroids(result, coded, options.tune, context)
            metrics |= {
                "steps": float(history.steps),
                "first_loss": history.losses[0],
                "last_loss": history.losses[-1],
            }
        return Result(result, tuple(actions), metrics)

    def _action(self, layer: Layer, info: dict[str, float]) -> Action:
        options = self.options
        size = Size(*(int(info[name]) for name in ("width", "asked", "residual")))
        what = f"v{size.width}-k{size.count}-{size.residual}, {info['bits']:.3f} bits per weight"
        reasons = []
        if info["centroids"] < size.count:
            reasons.append(f"only {int(info['centroids'])} distinct vectors")
        if info["nearest"]:
            rows = int(info["rows"])
            reasons.append(f"only {rows} rows of calibration data: errors are not spread")
        elif info["damping"] > options.damping:
            reasons.append(f"its Hessian is singular: damping raised to {info['damping']:g}")
        if info["dead"]:
            reasons.append(f"{int(info['dead'])} inputs are zero on all calibration data")
        what += f", relative error {info['error']:.2e}"
        return Action(layer.name, what, "; ".join(reasons))


def _matrix_shape(shape: Geometry) -> tuple[int, int]:
    """Rows and columns of what is quantized: of one expert, where it is a stack."""
    return shape.out // shape.groups, shape.depth


@dataclass(frozen=True)
class Lookups:
    """VPTQ of one layer after the other, see `ir.calibration.walk`."""

    options: VptqOptions

    def gather(self, site: Site) -> Hessian:
        """The second moments that all layers of the site share."""
        return hessian(site.rows())

    def solve(self, task: Task) -> Solved:
        """The layer's codebooks and indices, and the weight that they stand for."""
        stats: Hessian = task.stats
        w, h = as_matrix(task.geometry, task.weight)[0].float(), seen_or_even(stats)[0]
        is_nearest = stats.count < LEAST_ROWS
        dampings = [self.options.damping]

        def factor(ordered: Tensor) -> Tensor:
            if is_nearest:
                return torch.eye(len(ordered), device=ordered.device)
            upper, used = inverse_factor(ordered, self.options.damping, task.name)
            dampings.append(used)
            return upper

        generator = torch.Generator().manual_seed(task.seed)
        size = self.options.size(*w.shape)
        assert size is not None
        vectors = quantize(w, h, factor, self.options.settings(size), generator)
        value = vectors.value().to(w.device)
        widths = {part: lookups[0].columns for part, lookups in vectors.parts.items()}
        main = vectors.parts.get("main") or vectors.parts["outlier"]
        info = {
            "matrix_rows": float(w.shape[0]),
            "outlier": float(widths.get("outlier", 0)),
            "main": float(widths.get("main", 0)),
            "width": float(size.width),
            "asked": float(size.count),
            "residual": float(size.residual),
            "centroids": float(main[0].codebooks.shape[1]),
            "stored": float(vectors.nbytes * 8),
            "count": float(w.numel()),
            "bits": vectors.nbytes * 8 / w.numel(),
            "error": output_error(w, value, h),
            "rows": float(stats.count),
            "nearest": float(is_nearest),
            "damping": max(dampings),
            "dead": float((h.diagonal() == 0).sum()),
        }
        weight = from_matrix(task.geometry, value.to(task.weight.dtype)[None])
        return Solved(weight=weight, state=vectors.state(), info=info)


def vectors_of(solved: Solved) -> Vectors:
    """The stored form that `Lookups.solve` found."""
    info = solved.info
    widths = (int(info["outlier"]), int(info["main"]))
    return Vectors.from_state(solved.state, int(info["matrix_rows"]), widths)


def _metrics(solved: Sequence[Solved]) -> dict[str, float]:
    infos = [each.info for each in solved]
    bits = sum(info["stored"] for info in infos) / sum(info["count"] for info in infos)
    return {**layer_errors([info["error"] for info in infos]), "bits_per_weight": bits}
