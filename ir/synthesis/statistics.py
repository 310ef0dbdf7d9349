"""Batch norms of a program: what they remember of real data, and how far other data is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.device import set_device
from graphwright.ir.graph.nodes import copy_graph
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec
from graphwright.ir.tune.losses import main_output

FOLDED = "cleanup.fold_batch_norm"
INSTEAD = "Give calibration data, or a model that still has its trained batch norms."


@dataclass(frozen=True)
class Norm:
    """A batch norm with running statistics.

    Attributes:
        name: of the layer.
        node: the node of the graph that it normalizes.
        mean, variance: names of the running statistics in the state.
    """

    name: str
    node: str
    mean: str
    variance: str


def norms_of(program: Program) -> tuple[Norm, ...]:
    """The batch norms of a program that keep running statistics, in the graph's order."""
    found = []
    for layer in layers(program, {"batch_norm"}):
        value, mean, variance = (layer.node.args[i] for i in (0, 3, 4))
        stored = all(isinstance(s, fx.Node) and s.op == "get_attr" for s in (mean, variance))
        if stored and isinstance(value, fx.Node):
            names = (str(s.target) for s in (mean, variance) if isinstance(s, fx.Node))
            found.append(Norm(layer.name, value.name, *names))
    return tuple(found)


@dataclass(frozen=True)
class Subject:
    """A classifier of images that images can be made from.

    Attributes:
        image: its one input.
        shape: (channels, height, width) of an image.
        batch: images per call where the program takes one number only.
        classes: how many there are.
        norms: its batch norms.
    """

    image: TensorSpec
    shape: tuple[int, int, int]
    batch: int | None
    classes: int
    norms: tuple[Norm, ...]


def subject_of(program: Program, why: str = "bn_synthesis") -> Subject:
    """What a program is as a source of images.

    Raises:
        ModelError: it lacks what that takes: one input of images, class logits, float32 or float64,
            batch norms, running statistics that training has moved.
    """
    image, batch = image_input(program, why)
    norms = norms_of(program)
    if not norms:
        raise ModelError(f"{why} needs running statistics, and {_no_norm(program)}", fix=INSTEAD)
    untouched = [norm.name for norm in norms if not _is_trained(program, norm)]
    if len(untouched) == len(norms):
        raise ModelError(
            f"{why} needs running statistics of training, and those of {untouched[0]!r} are as a "
            "new batch norm has them: means 0, variances 1",
            fix=INSTEAD,
        )
    sizes = tuple(int(size) for size in program.examples[0].shape[1:])
    return Subject(image, (sizes[0], sizes[1], sizes[2]), batch, classes_of(program, why), norms)


def image_input(program: Program, why: str, least: int = 2) -> tuple[TensorSpec, int | None]:
    """The one input of a program, images, and how many it takes if it is a fixed number.

    Args:
        program: of the model.
        why: what asks for it.
        least: images that it has to take at a time.

    Raises:
        ModelError: there are others, or it is none of float images, or in half precision.
    """
    inputs = program.signature.inputs
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        said = ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in inputs) or "none"
        raise ModelError(
            f"{why} makes images, (batch, channels, height, width), and the model's inputs are "
            f"{said}",
            fix="Give data.",
        )
    image, first = inputs[0], inputs[0].shape[0]
    if image.dtype not in ("float32", "float64"):
        raise ModelError(
            f"{why} makes float32 images, and input {image.name!r} is {image.dtype}",
            fix="Compile the model in float32, and let cast.dtype follow.",
        )
    if isinstance(first, int) and first < least:
        raise ModelError(
            f"{why} matches statistics over images, and the model takes {first} at a time",
            fix="Trace it with a dynamic batch.",
        )
    return image, first if isinstance(first, int) else None


def classes_of(program: Program, why: str) -> int:
    """The number of classes of a classifier.

    Raises:
        ModelError: its output is no logits of shape (batch, classes).
    """
    try:
        shape = program.signature.outputs[main_output(program.signature)].shape
    except ArgumentError as error:
        raise ModelError(f"{why} needs class logits: {error.message}", fix="Give data.") from None
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        raise ModelError(
            f"{why} needs class logits, (batch, classes), and the model's output is {list(shape)}",
            fix="Give data.",
        )
    return shape[1]


def _no_norm(program: Program) -> str:
    if any(done.id == FOLDED for done in program.provenance):
        return f"{FOLDED} has folded the batch norms of the model"
    if any(True for _ in layers(program, {"batch_norm"})):
        return "the batch norms of the model keep none"
    return "the model has no batch norm"


def _is_trained(program: Program, norm: Norm) -> bool:
    mean, variance = program.state[norm.mean], program.state[norm.variance]
    return bool((mean != 0).any() or (variance != 1).any())


class Observed:
    """A program that gives its logits, and what its batch norms normalize, for images.

    Attributes:
        parameters: on the device; a copy of them with other values may take their place in a call.
        means, variances: the running statistics of every norm.
    """

    def __init__(self, program: Program, norms: Sequence[Norm], device: torch.device) -> None:
        program = program.eval()
        graph: Any = copy_graph(program.graph)
        set_device(graph, device)
        nodes = {node.name: node for node in graph.nodes}
        last = next(iter(graph.find_nodes(op="output")))
        logits = last.args[0][main_output(program.signature)]
        last.args = ((logits, *(nodes[norm.node] for norm in norms)),)
        state = {name: tensor.detach().to(device) for name, tensor in program.state.items()}
        self.module = fx.GraphModule(state, graph, class_name="Observed")
        self.parameters = {name: state[name] for name in program.parameters()}
        self.means = [state[norm.mean] for norm in norms]
        self.variances = [state[norm.variance] for norm in norms]

    def __call__(
        self, images: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (batch, classes), and (batch, channels, ...) in front of every norm."""
        if parameters is None:
            logits, *values = self.module(images)
        else:
            logits, *values = torch.func.functional_call(self.module, dict(parameters), (images,))
        return logits, values

    def distances(self, values: Sequence[Tensor], variance_weight: float = 1.0) -> list[Tensor]:
        """Per norm w * ||v - running variance|| + ||m - running mean||, 2-norms over channels.

        Args:
            values: what `__call__` gave.
            variance_weight: w; 1 in P25, larger in P72.

        Source: P25 and its predecessor SRe2L, whose code takes norms that are not squared.
        """
        return [
            distance(value, mean, variance, variance_weight)
            for value, mean, variance in zip(values, self.means, self.variances, strict=True)
        ]


def distance(value: Tensor, mean: Tensor, variance: Tensor, variance_weight: float = 1.0) -> Tensor:
    """Distance of a batch's statistics from running ones: see `Observed.distances`.

    Args:
        value: (batch, channels, ...); its variance is the biased one, as batch norm has it.
        mean, variance: (channels,).
        variance_weight: of the variances' part.
    """
    axes = [0, *range(2, value.dim())]
    found_variance, found_mean = torch.var_mean(value, axes, correction=0)
    of_variance: Tensor = torch.linalg.vector_norm(found_variance - variance)
    of_mean: Tensor = torch.linalg.vector_norm(found_mean - mean)
    return variance_weight * of_variance + of_mean


def distances_per_norm(program: Program, images: Tensor) -> dict[str, float]:
    """How far images are from what the batch norms of a program remember, by name of the norm.

    Args:
        program: a classifier with batch norms.
        images: (batch, channels, height, width).

    Raises:
        ModelError: as `subject_of` says.
    """
    norms = subject_of(program, "the distance of statistics").norms
    observed = Observed(program, norms, images.device)
    with torch.no_grad():
        found = observed.distances(observed(images)[1])
    return {norm.name: float(value) for norm, value in zip(norms, found, strict=True)}
