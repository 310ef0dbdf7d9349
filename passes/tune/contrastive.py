"""tune.contrastive: keeps the neighbours and the clusters of the model's embeddings."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import Batches, as_batches
from graphwright.ir.data.kmeans import kmeans
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, TuneOptions, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import check_teacher, main_of, main_output, wide
from graphwright.ir.tune.working import frozen
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._contrast.meta_nodes import (
    contrast,
    neighbours,
    reach,
    sharpened,
    soft_assignment,
)
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of

Factor = Annotated[float, Field(ge=0)]


class ContrastiveOptions(Bounded):
    """Options of tune.contrastive."""

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer, such as a class token, goes by its own name."""

    clusters: Annotated[int, Field(ge=2)] = 10
    """Clusters of the reference's embeddings of the training data."""

    neighbours: Annotated[int, Field(ge=1)] = 5
    """Nearest samples of a batch, by the reference's embeddings, that a sample is drawn to."""

    hops: Annotated[int, Field(ge=1)] = 1
    """Steps from neighbour to neighbour that still count, once for every path."""

    tau: Annotated[float, Field(gt=0)] = 0.5
    """Factor of the cosines inside the exponentials."""

    contrast: Factor = 0.5
    """Factor of the contrast; alpha of the paper, which has 0.2 to 12.5 by data set."""

    cluster: Factor = 0.5
    """Factor of the divergence from the sharpened clusters; beta of the paper."""

    tune: TuneOptions = TuneOptions(loss="teacher_mse")
    """Options of training; `loss` is what the contrast is added to."""


class Contrastive(Pass[ContrastiveOptions]):
    """Trains an embedding model so that neighbours and clusters stay what they were before.

    Adds to the loss of `tune`: `contrast` * L_c, in which a sample comes near to its neighbours and
    clusters move apart, and `cluster` * KL(p || q) of soft assignments to clusters. Neighbours are
    those of the batch by the embeddings of the model before the first pass, clusters the k-means of
    its embeddings of all training data, which stay. Negatives are sums over clusters, so that the
    cost grows with edges and clusters and not with pairs.

    Source: P22 ("PamC"), whose graph is given and whose centres learn; defaults of alpha, beta, r
    and tau are those it has for ACM.
    """

    contract = "lossy"
    needs = "training"
    papers = ("P22",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        chosen = chosen_parameters(program, o.targets, self.id)
        if context.teacher is None:
            raise ArgumentError(f"{self.id} needs the model as it was",
                                fix="In Python, pass teacher=program to the pass.")  # fmt: skip
        check_teacher(context.teacher, program)
        main = main_output(program.signature)
        shapes = [each.signature.outputs[main].shape for each in (program, context.teacher)]
        if len(shapes[0]) != 2 or shapes[0][1] != shapes[1][1]:
            raise ModelError(
                f"{self.id} takes an embedding [batch, size], and this output is "
                f"{list(shapes[0])}, the teacher's {list(shapes[1])}"
            )
        data = as_batches(context.training_data, program.signature)
        teacher = frozen(context.teacher, context.device)
        embeddings = _embeddings(teacher, data, main, context.device)
        if len(embeddings) <= o.clusters:
            raise ArgumentError(f"{self.id}: {len(embeddings)} samples have no {o.clusters} "
                                "clusters", fix="Lower clusters.")  # fmt: skip
        found = kmeans(embeddings, torch.ones(len(embeddings), device=context.device), o.clusters,
                       context.generator("clusters"))  # fmt: skip
        hook = MetaNodes(teacher, found.centroids, o)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[*training_hooks(program), hook])  # fmt: skip
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics_of(tuned.history))


class MetaNodes(Hook):
    """Adds the contrast with clusters and the divergence of assignments to the loss."""

    counts_on_last_step = False

    def __init__(self, teacher: Program, centres: Tensor, options: ContrastiveOptions) -> None:
        self.teacher, self.centres, self.options = teacher, centres, options
        self.main = main_output(teacher.signature)
        self.inputs = [spec.name for spec in teacher.signature.inputs]

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        o = self.options
        z = wide(main_of(self.teacher.signature, outputs))
        if len(z) <= o.neighbours:
            raise ArgumentError(
                f"a batch of {len(z)} samples has no {o.neighbours} neighbours for each",
                fix="Lower neighbours, or raise the data's batch_size.",
            )
        with torch.no_grad():
            flat = self.teacher.run_flat(tuple(batch[name] for name in self.inputs))
            near = neighbours(wide(flat[self.main]), o.neighbours)
            edges = reach(near, o.hops)
        q = soft_assignment(z, self.centres.to(z.dtype))
        assigned = q.detach().argmax(1)
        apart = contrast(z, edges, z.new_ones(edges.shape[1]), assigned, len(self.centres), o.tau)
        p = sharpened(q)
        divergence = (p * (p.log() - q.log())).sum(1).mean()
        return loss + o.contrast * apart + o.cluster * divergence


@torch.no_grad()
def _embeddings(teacher: Program, data: Batches, main: int, device: torch.device) -> Tensor:
    """(samples, size) of all the data."""
    names = [spec.name for spec in teacher.signature.inputs]
    parts = [teacher.run_flat(tuple(batch[name].to(device) for name in names))[main]
             for batch in data]  # fmt: skip
    return wide(torch.cat(parts)).float()
