"""What a model says of any number of images."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.program import Program
from graphwright.ir.tune.losses import main_output, wide

AT_ONCE = 64


def logits_of(program: Program, images: Tensor) -> Tensor:
    """The main output for images, (images, classes, ...), in batches that the program takes."""
    main, fixed = main_output(program.signature), program.signature.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else AT_ONCE
    found = []
    with torch.no_grad():
        for begin in range(0, len(images), size):
            part = images[begin : begin + size]
            if isinstance(fixed, int):  # the last batch is filled up with the first images
                part = images[torch.arange(begin, begin + size) % len(images)]
            found.append(wide(program.run_flat((part,))[main]))
    return torch.cat(found)[: len(images)]
