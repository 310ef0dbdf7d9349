"""What entropy coding of integer weights saves, and how fast they are decoded.

    python tests/benchmarks/entropy.py [--only resnet,gpt,encoder] [--most MB]

Codes of the digits ResNet, the small GPT and the sentence encoder in int8 (a scale per channel)
and int4 (blocks of 32), tensors of 4 KiB and more together, as bits per weight: the fixed width,
zlib and LZMA at their strongest (the standard library has no zstd before Python 3.14), the order-0
entropy of each tensor without tables, and `store.entropy` with 1 and with up to 8 row types, all
counted. `--most` leaves out tensors, in order, beyond so many megabytes of each case. The last
rows of the ResNet have one scale per tensor, where rows are unlike.
"""

from __future__ import annotations

import argparse
import lzma
import time
import zlib
from collections.abc import Iterator

import _paths  # noqa: F401  puts tests/ on the path
import numpy as np
import torch
from models import digits, encoder, gpt

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.files.entropy.stream import coded, decoded, refusal
from graphwright.ir.layers.selectors import layers

SMALLEST = 4096


def program(model: str) -> gw.Program:
    if model == "resnet":
        return digits.traced(digits.trained("resnet"))
    return gpt.program() if model == "gpt" else encoder.program()


def tensors(made: gw.Program) -> list[np.ndarray]:
    found = [t.detach().numpy() for t in made.state.values() if not t.dtype.is_floating_point]
    return [values for values in found if not refusal(values, SMALLEST)]


def cases(model: str) -> Iterator[tuple[str, list[np.ndarray], int]]:
    """Name, tensors, and bits of a code."""
    whole, context, how = program(model), Context(), {}
    if model == "resnet":  # convolutions need fixed ranges
        whole = gw.passes.cleanup.FoldBatchNorm()(whole)
        context, how = (
            Context(calibration=[{"x": digits.data()[0][:64]}]),
            {"activations": "static"},
        )
    yield f"{model} int8", tensors(gw.passes.quantize.Int8(**how).run(whole, context).program), 8
    yield (
        f"{model} int4",
        tensors(gw.passes.quantize.Rtn(bits=4, block=32).run(whole, context).program),
        4,
    )
    if model == "resnet":
        weights = [whole.state[layer.weight].detach() for layer in layers(whole) if layer.weight]
        codes = [(w / w.abs().max() * 127).round().to(torch.int8).numpy() for w in weights]
        yield (
            "resnet int8, a scale per tensor",
            [c.reshape(len(c), -1) for c in codes if not refusal(c, SMALLEST)],
            8,
        )


def first(values: list[np.ndarray], most: float) -> list[np.ndarray]:
    """Tensors in order, as long as they go into so many megabytes together."""
    kept, size = [], 0
    for one in values:
        if size + one.nbytes <= most * 1e6:
            kept.append(one)
            size += one.nbytes
    return kept


def row(name: str, values: list[np.ndarray], width: int) -> str:
    size = sum(v.nbytes for v in values)
    weights = size * 8 / width
    whole = [v.tobytes() for v in values]
    packed = [
        sum(len(pack(data)) for data in whole)
        for pack in (lambda d: zlib.compress(d, 9), lambda d: lzma.compress(d, preset=9 | 1 << 31))
    ]
    entropy = 0.0
    ours, speeds = [], []
    for types in (1, 8):
        begin = time.perf_counter()
        made = [coded(v, types) for v in values]
        encode = time.perf_counter() - begin
        begin = time.perf_counter()
        for v, one in zip(values, made, strict=True):
            if one is not None:
                assert (decoded(one.stream, v.dtype, v.shape) == v).all()
        decode = time.perf_counter() - begin
        ours.append(sum(v.nbytes if c is None else len(c.stream)
                        for v, c in zip(values, made, strict=True)))  # fmt: skip
        speeds.append(size / 1e6 / np.array([encode, decode]))
        entropy = sum(v.nbytes * 8 if c is None else c.entropy * c.codes
                      for v, c in zip(values, made, strict=True))  # fmt: skip
    bits = [8 * b / weights for b in (size, *packed)] + [entropy / weights]
    bits += [8 * b / weights for b in ours]
    cells = " | ".join(f"{b:.3f}" for b in bits)
    speed = " | ".join(f"{e:.1f} / {d:.1f}" for e, d in speeds)
    return f"| {name} | {size / 1e6:.2f} | {cells} | {speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="resnet,gpt,encoder")
    parser.add_argument("--most", type=float, default=float("inf"))
    given = parser.parse_args()
    print("| codes | MB | fixed | zlib | LZMA | order 0 | 1 type | up to 8 types | MB/s to code / "
          "to decode, 1 type | up to 8 |")  # fmt: skip
    print("| --- " * 10 + "|")
    for model in given.only.split(","):
        for name, values, width in cases(model):
            print(row(name, first(values, given.most), width), flush=True)


if __name__ == "__main__":
    main()
