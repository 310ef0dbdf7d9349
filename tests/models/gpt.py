"""A small byte-level GPT trained on the text of Python's own standard library.

Four layers of width 256 over a context of 128 bytes, trained once in a few minutes on one core and
kept under out/models/. Run as a script it trains, when it has to, and prints its perplexity.
"""

from __future__ import annotations

import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim.lr_scheduler import OneCycleLR

from graphwright.ir.program import Program
from graphwright.ir.trace.capture import trace

CACHE = Path(__file__).parents[2] / "out" / "models" / "gpt.pt"
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 256, 128, 256, 4, 4
STEPS, BATCH, INNER_RATE, OUTER_RATE = 850, 8, 6e-3, 3e-3
HELD_OUT_SEQUENCES = 256


class Attention(nn.Module):
    """Causal self-attention with four projections of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and a GELU network of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Bytes (batch, seq) to logits (batch, seq, 256); the head is not tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids) + self.position[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """The library's source as bytes (uint8, 1-D): for training, and of files held out from it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not skipped.intersection(name.parts):
            is_held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26
            parts[is_held_out].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, held_out


def sequences(data: torch.Tensor, starts: torch.Tensor, length: int = CONTEXT) -> torch.Tensor:
    """Pieces of the text as int64 (len(starts), length)."""
    return data[starts[:, None] + torch.arange(length)].long()


def train(steps: int = STEPS) -> Gpt:
    """Trains a fresh model, in bfloat16 autocast; the global random state is left as it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Gpt()
    data, _ = text()
    # Muon learns from few bytes; it is meant for the matrices inside the blocks.
    inner = [p for p in model.blocks.parameters() if p.dim() == 2]
    outer = [p for p in model.parameters() if all(p is not q for q in inner)]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(inner, INNER_RATE, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, OUTER_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )
    schedules = [
        OneCycleLR(each, rate, steps, pct_start=0.1, cycle_momentum=False)
        for each, rate in zip(optimizers, (INNER_RATE, OUTER_RATE), strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
        batch = sequences(data, starts, CONTEXT + 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        if step % 100 == 0:
            sys.stderr.write(f"step {step}: loss {loss.item():.3f}\n")
    return model.eval()


def gpt() -> Gpt:
    """The trained model in eval mode; trained and stored when it is not there yet."""
    if not CACHE.exists():
        state = train().state_dict()
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        part = CACHE.with_suffix(".part")
        torch.save(state, part)
        part.rename(CACHE)
    model = Gpt()
    model.load_state_dict(torch.load(CACHE, weights_only=True))
    return model.eval()


def program() -> Program:
    """The trained model as a program, with free batch and sequence sizes."""
    example = sequences(text()[0], torch.arange(2) * CONTEXT, 16)
    free = {"input_ids": {0: "batch", 1: "seq"}}
    return trace(gpt(), (example,), dynamic=free)


def calibration(n: int, batch_size: int = 16) -> list[dict[str, torch.Tensor]]:
    """n sequences of the training text, 128 bytes each, in batches."""
    data, _ = text()
    starts = torch.randint(len(data) - CONTEXT, (n,), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids} for ids in sequences(data, starts).split(batch_size)]


def perplexity(model: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Perplexity per byte on held-out text: 256 sequences spread over the held-out files."""
    _, data = text()
    starts = torch.linspace(0, len(data) - CONTEXT - 1, HELD_OUT_SEQUENCES).long()
    total = 0.0
    with torch.no_grad():
        for batch in sequences(data, starts, CONTEXT + 1).split(32):
            logits = model(batch[:, :-1])
            total += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return math.exp(total / (HELD_OUT_SEQUENCES / 32))


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = gpt()
    ready = time.perf_counter()
    figure = perplexity(model)
    done = time.perf_counter()
    sys.stdout.write(f"perplexity {figure:.4f}; {ready - began:.1f} s, then {done - ready:.1f} s\n")
