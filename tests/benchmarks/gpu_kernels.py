"""Checks and times every Triton kernel on the GPU of this machine.

    python tests/benchmarks/gpu_kernels.py --out out/gpu --budget 240
    python tests/benchmarks/gpu_kernels.py --out out/gpu --only blocks_linear --tune

Works from a checkout, installed or not; needs torch and triton only. Writes `gpu_kernels.json`
after every row and `gpu_kernels.md` at the end. A kernel that is wrong is not timed.

Every time is a CUDA graph of 20 calls that rotates over more than 200 MB of distinct inputs (the
L2 cache holds 50 MB), median of 7 replays. The floor is what this very device needs: bytes moved
at the copy bandwidth measured in the same run, or products at its measured matrix throughput,
whichever takes longer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]


def use_checkout() -> None:
    """Makes `graphwright` importable from the folders of the checkout."""
    for name, folder in [("graphwright", "core"), ("graphwright.ir", "ir"),
                         ("graphwright.backends", "backends")]:  # fmt: skip
        home = ROOT / folder
        spec = importlib.util.spec_from_file_location(
            name, home / "__init__.py", submodule_search_locations=[str(home)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


if importlib.util.find_spec("graphwright") is None:
    use_checkout()

from graphwright.ir.ops import OPS

Arguments = tuple[Any, ...]
CALLS, REPLAYS, ROTATE_BYTES = 20, 7, 200 << 20
ERROR_BOUND = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Row:
    """One timed shape. Times in microseconds; a peer that was not run is None."""

    op: str
    shape: str
    floor_us: float
    ours_us: float
    eager_us: float
    compiled_us: float | None
    peer_us: float | None
    peer: str

    @property
    def share_of_floor(self) -> float:
        return self.floor_us / self.ours_us


@dataclass
class Job:
    """What to time: an op on inputs made by `make`, with the bytes and products it needs."""

    op: str
    shape: str
    make: Callable[[], Arguments]
    bytes: int
    flops: int = 0
    peer: str = ""
    peer_call: Callable[..., Any] | None = None
    peer_inputs: Callable[[Arguments], Arguments] = lambda given: given
    compile: bool = True
    eager_call: Callable[..., Any] | None = None
    """In the place of the eager face, where that cannot be captured: it asks for lengths."""


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def time_us(call: Callable[..., Any], inputs: list[Arguments]) -> float:
    """Median time of one call, launches excluded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(*inputs[index % len(inputs)])
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def preflight() -> dict[str, Any]:
    """The device, and what it can do at most."""
    import triton

    source = torch.zeros(1 << 27, device="cuda")
    target = torch.empty_like(source)
    # a kernel that reads and writes moves more per second than the copy engine
    copy_us = min(
        time_us(target.copy_, [(source,)]),
        time_us(lambda x: torch.neg(x, out=target), [(source,)]),
    )
    left, right = random(8192, 8192), random(8192, 8192)
    matmul_us = time_us(torch.matmul, [(left, right)])
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_per_s": 2 * source.nbytes / copy_us / 1000,
        "matmul_tflops": 2 * 8192**3 / matmul_us / 1e6,
    }


def with_floats(sample: Arguments, dtype: torch.dtype) -> Arguments:
    """A sample on the GPU, its floating-point tensors in `dtype`."""
    return tuple(
        v.cuda().to(dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
        for v in sample
    )


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def wrong_ops() -> dict[str, str]:
    """Ops whose kernel differs from the eager face in float64 on any sample and dtype."""
    wrong: dict[str, str] = {}
    checked = 0
    for name, op in OPS.items():
        for index, sample in enumerate(op.samples()):
            for dtype, bound in ERROR_BOUND.items():
                given = with_floats(sample, dtype)
                kernel = op.load_kernel()
                if not kernel.fits(*given):
                    continue
                reference = op.eager(*with_floats(given, torch.float64))
                for got, expected in zip(
                    as_tuple(kernel.launch(*given)), as_tuple(reference), strict=True
                ):
                    if not expected.numel():
                        continue
                    error = (got.double() - expected.double()).abs().max()
                    checked += 1
                    if not error <= bound * expected.double().abs().max():
                        wrong[name] = f"sample {index}, {dtype}: largest error {float(error):.3g}"
    print(f"correctness: {checked} results of {len(OPS)} ops, wrong: {wrong or 'none'}")
    return wrong


def elementwise_jobs() -> Iterator[Job]:
    m, n = 8192, 4096
    yield Job("bias_act", f"gelu {m}x{n}", lambda: (random(m, n), random(n), "gelu"), 4 * m * n)
    m2, n2 = 4096, 14336
    yield Job(
        "gated_act",
        f"silu {m2}x{n2}",
        lambda: (random(m2, n2), random(m2, n2), "silu"),
        6 * m2 * n2,
    )
    b, h, s = 8, 12, 512
    yield Job(
        "scale_mask", f"{b}x{h}x{s}x{s}",
        lambda: (random(b, h, s, s), random(b, 1, 1, s), 0.125), 4 * b * h * s * s,
    )  # fmt: skip


def norm_jobs() -> Iterator[Job]:
    for m, c in [(4096, 4096), (1, 4096), (4096, 8192)]:
        yield Job(
            "add_rms_norm", f"{m}x{c}",
            lambda m=m, c=c: (random(m, c), random(m, c), random(c), 1e-6, True), 8 * m * c,
        )  # fmt: skip
    yield Job(
        "rms_norm", "4096x4096", lambda: (random(4096, 4096), random(4096), 1e-6), 4 * 4096 * 4096
    )
    for keep in (True, False):
        yield Job(
            "add_layer_norm", f"32768x768{'' if keep else ', sum not kept'}",
            lambda keep=keep: (
                random(32768, 768), random(32768, 768), random(768), random(768), 1e-5, keep
            ),
            (8 if keep else 6) * 32768 * 768,
        )  # fmt: skip


def int8_jobs() -> Iterator[Job]:
    for k, n in [(4096, 4096), (4096, 14336)]:
        for m in (1, 4, 16, 64, 256, 1024, 4096):
            yield Job(
                "int8_linear", f"{m}x{k}x{n}",
                lambda m=m, k=k, n=n: (
                    random(m, k),
                    torch.randint(-127, 128, (n, k), device="cuda").to(torch.int8),
                    random(n).abs() / 1000,
                    random(n),
                    "none",
                ),
                k * n + 2 * m * (k + n),
                2 * m * k * n,
                peer="bf16 linear",
                peer_call=F.linear,
                peer_inputs=lambda given: (given[0], given[1].to(given[0].dtype), given[3]),
                compile=n == 4096 and m in (1, 64, 4096),
            )  # fmt: skip


def low_bit_jobs() -> Iterator[Job]:
    """Compressed weights; the share of the floor at one token is that of the memory bandwidth."""
    for k, n in [(4096, 4096), (4096, 14336)]:
        for m in (1, 2, 4, 16, 64, 256, 1024, 4096):
            stored = {
                "blocks_linear": k * n * (4 + 20 / 128) / 8,
                "table_linear": k * n * (4 + 32 / 64) / 8,
                "codebook_linear": k * n * 12 / 64 + 4096 * 16,
            }
            for name, size in stored.items():
                yield Job(
                    name, f"{m}x{k}x{n}",
                    lambda name=name, m=m, k=k, n=n: low_bit_inputs(name, m, k, n),
                    int(size) + 2 * m * (k + n),
                    2 * m * k * n,
                    peer="bf16 linear",
                    peer_call=F.linear,
                    peer_inputs=lambda given, k=k, n=n: (given[0], random(n, k)),
                    compile=n == 4096 and m == 1,
                )  # fmt: skip


def low_bit_inputs(name: str, m: int, k: int, n: int) -> Arguments:
    """4 bits with a zero point and a scale to 128; NF4; codebooks of 4096 vectors of 8."""

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)

    rest = (random(n), None, None, None)
    if name == "blocks_linear":
        blocks = k // 128
        scale = random(n, blocks).abs() / 100
        return (
            random(m, k),
            codes(n, blocks, 64),
            scale,
            codes(n, blocks // 2),
            *rest,
            4,
            128,
            "none",
        )
    if name == "table_linear":
        scale = random(n * k // 64, dtype=torch.float32).abs() / 10
        return random(m, k), codes(n * k // 2), scale, *rest, "nf4", 64, n, "none"
    return random(m, k), codes(n // 8, k * 12 // 8), random(1, 4096, 8), *rest, 12, n, "none"


HEADS, SHARED, SIZE, BLOCK = 32, 8, 128, 64
"""Heads of queries, heads of keys that they share, numbers of a head, tokens of a block."""


def cache_jobs() -> Iterator[Job]:
    """Attention over a cache: steps of one token, and a prompt; floats, codes and blocks."""
    for batch, filled, tokens in [(1, 1024, 1), (1, 16384, 1), (16, 4096, 1), (1, 0, 2048)]:
        for form, width in [("bf16", 2.0), ("blocks", 2.0), ("int8", 1.0), ("int4", 0.5)]:
            slots = filled + tokens
            yield Job(
                "cached_attention", f"{form} {batch}x{filled}+{tokens}",
                lambda form=form, batch=batch, filled=filled, tokens=tokens: cache_inputs(
                    form, batch, filled, tokens
                ),
                int(2 * batch * slots * SHARED * SIZE * width),
                4 * batch * HEADS * tokens * (filled + (tokens + 1) // 2) * SIZE,
                compile=False,
                eager_call=attend_by_torch,
            )  # fmt: skip


def cache_inputs(form: str, batch: int, filled: int, tokens: int) -> Arguments:
    """Buffers as the runner of the triton backend lays them out."""
    capacity = -(-(filled + tokens) // BLOCK) * BLOCK
    q = random(batch, HEADS, tokens, SIZE)
    k, v = (random(batch, SHARED, tokens, SIZE) for _ in range(2))
    lengths = torch.full((batch,), filled, device="cuda", dtype=torch.int32)
    rest = (SIZE**-0.5, 0, 0.0, None)
    if form in ("bf16", "blocks"):
        blocks, block, table = batch, capacity, None
        if form == "blocks":
            blocks, block = 1 + batch * capacity // BLOCK, BLOCK
            table = (torch.randperm(blocks - 1, device="cuda") + 1).to(torch.int32).view(batch, -1)
        buffers = (random(blocks, SHARED, block, SIZE) for _ in range(2))
        return (q, k, v, *buffers, lengths, table, *rest, None, None)
    shape = (batch, SHARED, capacity, SIZE if form == "int8" else SIZE // 2)
    codes = (torch.randint(0, 127, shape, device="cuda") for _ in range(2))
    buffers = (c.to(torch.int8 if form == "int8" else torch.uint8) for c in codes)
    scales = (random(SHARED, SIZE, dtype=torch.float32).abs() / 64,
              random(batch, SHARED, capacity, dtype=torch.float32).abs() / 64)  # fmt: skip
    return (q, k, v, *buffers, lengths, None, *rest, *scales)


def attend_by_torch(*given: Any) -> Tensor:
    """PyTorch's own attention on floats of the same sizes, without the writing."""
    q, k = given[:2]
    slots = given[3].shape[2] if given[6] is None else given[6].shape[1] * BLOCK
    if q.shape[2] > 1:  # a prompt
        return F.scaled_dot_product_attention(q, k, given[2], is_causal=True, enable_gqa=True)
    keys = given[3]
    if given[6] is not None or not keys.is_floating_point():
        keys = HELD.setdefault((len(q), slots), random(len(q), SHARED, slots, SIZE))
    return F.scaled_dot_product_attention(q, keys, keys, enable_gqa=True)


HELD: dict[tuple[int, int], Tensor] = {}
"""Floats of the size of a cache of codes or blocks, for PyTorch's attention."""


def run_job(job: Job, device: dict[str, Any]) -> Row:
    """Times one job against the eager face, torch.compile of it, and its peer."""
    op = OPS[job.op]
    first = job.make()
    size = sum(v.numel() * v.element_size() for v in first if isinstance(v, Tensor))
    inputs = [first, *(job.make() for _ in range(min(CALLS, ROTATE_BYTES // size + 1) - 1))]
    compiled = None
    if job.compile:
        torch._dynamo.reset()
        compiled = time_us(torch.compile(op.eager), inputs)
    peer = None
    if job.peer_call is not None:
        peer = time_us(job.peer_call, [job.peer_inputs(given) for given in inputs])
    floor = max(
        job.bytes / device["copy_gb_per_s"] / 1000, job.flops / device["matmul_tflops"] / 1e6
    )
    return Row(
        job.op, job.shape, floor, time_us(op.load_kernel().launch, inputs),
        time_us(job.eager_call or op.eager, inputs), compiled, peer, job.peer,
    )  # fmt: skip


class Norm(torch.nn.Module):
    """RMS norm as published decoders write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(torch.nn.Module):
    """One decoder layer: attention and SwiGLU, pre-norm."""

    def __init__(self, size: int = 2048, inner: int = 8192, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(size), Norm(size)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(size, size, bias=False) for _ in range(4))
        self.gate, self.up = (torch.nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@torch.no_grad()
def whole_model() -> list[dict[str, Any]]:
    """Two decoder layers in bfloat16, traced and fused by us, against eager and torch.compile."""
    from graphwright.backends.triton.fuse import count_ops, fuse
    from graphwright.ir.graph.device import set_device
    from graphwright.ir.trace.capture import trace

    model = torch.nn.Sequential(Block(), Block()).bfloat16().eval()
    example = torch.randn(2, 4, 2048, dtype=torch.bfloat16)
    fused = fuse(trace(model, (example,), dynamic={"input": {0: "batch", 1: "seq"}}))
    set_device(fused.graph, torch.device("cuda"))
    ours, model = fused.module.cuda(), model.cuda()
    rows = []
    for tokens in (1, 128, 2048):
        x = random(1, tokens, 2048)
        wanted, got = model(x).double(), ours(x)[0].double()
        torch._dynamo.reset()
        rows.append(
            {
                "tokens": tokens,
                "fused": count_ops(fused.graph),
                "relative_error": float((wanted - got).norm() / wanted.norm()),
                "ours_us": time_us(ours, [(x,)]),
                "eager_us": time_us(model, [(x,)]),
                "compiled_us": time_us(torch.compile(model), [(x,)]),
            }
        )
        print(rows[-1])
    return rows


def markdown(device: dict[str, Any], rows: list[Row], models: list[dict[str, Any]]) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    lines = [
        f"{device['device']}, torch {device['torch']}, triton {device['triton']}; measured copy "
        f"{device['copy_gb_per_s']:.0f} GB/s, bf16 matrix product {device['matmul_tflops']:.0f} "
        "TFLOP/s. bfloat16; times in microseconds.",
        "",
        "| op | shape | floor | ours | of floor | eager | compile | bf16 linear | eager / ours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row.op, row.shape, cell(row.floor_us), cell(row.ours_us)]
        cells += [f"{row.share_of_floor:.0%}", cell(row.eager_us), cell(row.compiled_us)]
        lines += [
            f"| {' | '.join(cells)} | {cell(row.peer_us)} | {row.eager_us / row.ours_us:.2f} |"
        ]
    if models:
        lines += ["", "| two decoder layers, tokens | ours | eager | compile | relative error |",
                  "| ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for found in models:
        lines.append(
            f"| {found['tokens']} | {found['ours_us']:.0f} | {found['eager_us']:.0f} "
            f"| {found['compiled_us']:.0f} | {found['relative_error']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which to stop")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--tune", action="store_true", help="measure and keep tile sizes first")
    arguments = parser.parse_args()
    if arguments.tune:
        os.environ["GRAPHWRIGHT_TUNE"] = "1"
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = preflight()
    print(device)
    wrong = wrong_ops()
    rows: list[Row] = []
    skipped: list[str] = []
    models: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    jobs = (*norm_jobs(), *elementwise_jobs(), *int8_jobs(), *low_bit_jobs(), *cache_jobs())
    for job in (job for job in jobs if arguments.only in job.op):
        if job.op in wrong or time.monotonic() - began > arguments.budget:
            skipped.append(f"{job.op} {job.shape}")
            continue
        rows.append(run_job(job, device))
        print(f"{time.monotonic() - began:5.0f} s  {rows[-1]}", flush=True)
        record |= {"device": device, "wrong": wrong, "skipped": skipped}
        record |= {"rows": [asdict(row) for row in rows]}
        (arguments.out / "gpu_kernels.json").write_text(json.dumps(record, indent=1))
    (arguments.out / "gpu_kernels.md").write_text(markdown(device, rows, models))
    if not arguments.only and time.monotonic() - began < arguments.budget:
        models = whole_model()
    record |= {"skipped": skipped, "models": models, "seconds": time.monotonic() - began}
    (arguments.out / "gpu_kernels.json").write_text(json.dumps(record, indent=1))
    (arguments.out / "gpu_kernels.md").write_text(markdown(device, rows, models))
    print(markdown(device, rows, models), "skipped:", skipped)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
