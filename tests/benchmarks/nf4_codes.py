"""NF4 and FP4 codes, scales and values beside those of bitsandbytes, on a CPU.

    pip install --no-deps --target FOLDER bitsandbytes==0.50.2
    PYTHONPATH=FOLDER python tests/benchmarks/nf4_codes.py

For each weight: codes that differ, 8-bit codes of the scales that differ (double quantization), and
the largest difference of the rebuilt weights over the largest weight. Where codes of scales differ,
"ours nearer" counts those whose level is at least as near to the scale as theirs (in float64).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from graphwright.ir.ops.table import levels, unpack
from graphwright.ir.stored import table as table_math

SHAPES = ((384, 384), (1536, 384), (37, 75), (1000, 333))


def main() -> None:
    from bitsandbytes import functional

    torch.set_num_threads(1)
    line = "| {} | {} | {} of {} | {} of {} | {} of {} | {:.1e} |\n"
    sys.stdout.write(
        "| weight | type | codes differ | scale codes differ | ours nearer | values |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
    )
    for seed, shape in enumerate(SHAPES):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        for table in ("nf4", "fp4"):
            theirs, state = functional.quantize_4bit(
                w, blocksize=64, quant_type=table, compress_statistics=True
            )
            ours = table_math.quantize(w, table, 64, double=True)
            assert ours.double is not None
            count = w.numel()
            codes = [unpack(c, table, count) for c in (ours.codes, theirs.flatten())]
            moved = state.absmax != ours.double[0]
            nearer = _nearer(w, table, ours.double[0], state.absmax, ours.double[1])
            value = functional.dequantize_4bit(theirs, state)
            difference = float((value - ours.value()).abs().max() / w.abs().max())
            sys.stdout.write(
                line.format(
                    "x".join(map(str, shape)), table, int((codes[0] != codes[1]).sum()), count,
                    int(moved.sum()), moved.numel(), int(nearer[moved].sum()), int(moved.sum()),
                    difference,
                )
            )  # fmt: skip


def _nearer(w: Tensor, table: str, ours: Tensor, theirs: Tensor, second: Tensor) -> Tensor:
    """Whether our code of every scale is at least as near as theirs."""
    _, scale = table_math.quantize_blocks(w, table, 64)
    each = second.double().repeat_interleave(table_math.SCALE_BLOCK)[: len(scale)]
    target = (scale - scale.mean()).double() / each
    level = levels("dynamic").double()
    ours_off, theirs_off = ((level[c.long()] - target).abs() for c in (ours, theirs))
    return ours_off <= theirs_off


if __name__ == "__main__":
    main()
