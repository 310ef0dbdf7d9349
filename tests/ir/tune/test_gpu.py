"""Training on a CUDA device gives what training on the CPU gives."""

from __future__ import annotations

import pytest
import torch
from models import tune_net as lab

from graphwright.ir.context import Context
from graphwright.ir.tune import TuneOptions, tune

CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_equals_the_cpu(program, data) -> None:
    options = TuneOptions(epochs=3, lr=0.01, hold_out=0.25, optimizer="sgd")
    here = tune(program, data(8), options, Context())
    there = tune(program, data(8), options, Context(device=CUDA))
    assert {t.device.type for t in there.program.state.values()} == {"cpu"}
    # float32 kernels of another device (TF32 is off by default for matrices, on for convolutions)
    assert there.history.losses == pytest.approx(here.history.losses, rel=1e-3)
    for name, tensor in here.program.state.items():
        torch.testing.assert_close(there.program.state[name], tensor, rtol=1e-2, atol=1e-3)


def test_bfloat16_and_dropout_and_resume(tmp_path) -> None:
    program = lab.traced(lab.fresh(dropout=0.3), 4, 1, 4, 4)
    x, labels = lab.images()
    batches = lab.table(program.signature, x, labels, 8)
    before = torch.cuda.get_rng_state()
    options = TuneOptions(epochs=30, lr=0.01, precision="bf16")
    context = Context(device=CUDA, work=tmp_path, checkpoint_seconds=0.0)
    tuned = tune(program, batches, options, context)
    again = tune(program, batches, options, context)
    assert again.history == tuned.history
    for name, tensor in tuned.program.state.items():
        assert torch.equal(again.program.state[name], tensor)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert tuned.history.losses[-1] < 0.7 * tuned.history.losses[0]


def test_a_teacher_on_the_device(program, lab) -> None:
    torch.manual_seed(5)
    teacher = lab.traced(lab.Net().eval(), 4, 1, 4, 4)
    x, _ = lab.images()
    options = TuneOptions(epochs=10, lr=0.02, loss="kl")
    context = Context(device=CUDA, teacher=teacher)
    losses = tune(program, [(part,) for part in x.split(8)], options, context).history.losses
    assert losses[-1] < 0.2 * losses[0]
    assert {t.device.type for t in teacher.state.values()} == {"cpu"}
