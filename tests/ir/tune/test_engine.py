"""The loop against plain PyTorch loops over the model itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import tune_net as lab
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import Hook, Moment, TuneOptions, tune

Data = Callable[[int], Batches]


def plain(**options) -> TuneOptions:
    """Options without shuffling and decay of the learning rate, to follow with a plain loop."""
    return TuneOptions(**{"shuffle": False, "schedule": "constant", **options})


def state(program: gw.Program) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in program.state.items()}


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"optimizer": "sgd", "lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.0}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ({"optimizer": "adam", "lr": 0.01}, lambda p: torch.optim.Adam(p, lr=0.01)),
        ({"optimizer": "adamw", "lr": 0.01, "betas": (0.8, 0.9)},
         lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)),
    ],
)  # fmt: skip
def test_equals_a_plain_loop_over_the_model(program: gw.Program, data: Data, options, make) -> None:
    """The reference is the `nn.Module` in training mode: batch norm included."""
    tuned = tune(program, data(8), plain(epochs=3, **options), Context())
    model = lab.fresh().train()
    optimizer = make(model.parameters())
    x, labels = lab.images()
    losses = []
    for _ in range(3):
        for rows in torch.arange(48).split(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    expected = model.state_dict()
    for name, tensor in tuned.program.state.items():
        # float32 over 18 steps: the exported graph runs the same kernels
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert tuned.history.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(tuned.program(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_nothing_of_the_caller_is_touched(program: gw.Program, data: Data) -> None:
    before = state(program)
    versions = {name: tensor._version for name, tensor in program.state.items()}
    random_state = torch.get_rng_state()
    tuned = tune(program, data(8), TuneOptions(epochs=1), Context())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in program.state.items():
        assert torch.equal(tensor, before[name])
        assert tensor._version == versions[name]
        assert tensor.grad is None
        assert not torch.equal(tuned.program.state[name], tensor), f"{name} has not moved"


def test_the_result_is_in_inference_mode(data: Data) -> None:
    program = lab.traced(lab.fresh(dropout=0.5), 4, 1, 4, 4)
    for given in (program, program.train()):
        result = tune(given, data(8), TuneOptions(epochs=1), Context()).program
        x, _ = lab.images()
        assert torch.equal(result(x), result(x))
        assert not [n for n in result.graph.nodes if "dropout" in str(n.target)]
        (norm,) = [n for n in result.graph.nodes if "batch_norm" in str(n.target)]
        assert norm.args[5] is False


def test_dropout_is_drawn_while_training(data: Data) -> None:
    """One epoch at an unmeasurable learning rate: losses differ by the masks alone."""
    program = lab.traced(lab.fresh(dropout=0.5), 4, 1, 4, 4)
    runs = [
        tune(program, data(48), plain(epochs=3, lr=1e-12), Context(seed=seed)).history.losses
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2]}) == 6


def test_frozen_parameters_and_those_not_named_stay(program: gw.Program, data: Data) -> None:
    program.state["conv.weight"].requires_grad_(False)
    tuned = tune(program, data(8), TuneOptions(epochs=1), Context(), names=["fc.weight"])
    for name in ("conv.weight", "conv.bias", "norm.weight", "fc.bias"):
        assert tuned.program.state[name] is program.state[name]
    assert not torch.equal(tuned.program.state["fc.weight"], program.state["fc.weight"])
    assert not tuned.program.state["conv.weight"].requires_grad
    assert tuned.program.state["fc.weight"].requires_grad


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


def test_accumulation_equals_a_larger_batch() -> None:
    torch.manual_seed(0)
    program = lab.traced(NoNorm().eval(), 4, 1, 4, 4)
    x, labels = lab.images()
    results = []
    for size, accumulate in ((16, 1), (4, 4)):
        batches = lab.table(program.signature, x, labels, size)
        options = TuneOptions(epochs=4, accumulate=accumulate, optimizer="sgd", lr=0.1)
        results.append(tune(program, batches, options, Context()))
    for name, tensor in results[0].program.state.items():
        # the order of sums in float32
        torch.testing.assert_close(results[1].program.state[name], tensor, rtol=1e-5, atol=1e-6)
    assert results[0].history.losses == pytest.approx(results[1].history.losses, rel=1e-5)


class Watch(Hook):
    """Keeps what it sees at every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.rates: list[float] = []

    def before_step(self, at: Moment) -> None:
        grads = [p.grad.flatten() for p in at.parameters.values() if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))
        self.rates.append(at.optimizer.param_groups[0]["lr"])


def test_gradients_are_clipped(program: gw.Program, data: Data) -> None:
    free, clipped = Watch(), Watch()
    tune(program, data(8), plain(epochs=1, lr=1e-9), Context(), hooks=[free])
    tune(program, data(8), plain(epochs=1, lr=1e-9, clip_norm=0.5), Context(), hooks=[clipped])
    assert max(free.norms) > 0.5
    for norm, bounded in zip(free.norms, clipped.norms, strict=True):
        assert bounded == pytest.approx(min(norm, 0.5), rel=1e-4)  # float32


def test_the_learning_rate_follows_the_schedule(program: gw.Program, data: Data) -> None:
    watch = Watch()
    options = TuneOptions(steps=6, lr=0.5, warmup=2, schedule="linear")
    tune(program, data(8), options, Context(), hooks=[watch])
    assert watch.rates == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 6), ({"epochs": 2}, 12), ({"steps": 4}, 4), ({"steps": 9}, 9),
     ({"steps": 9, "epochs": 1}, 6), ({"epochs": 2, "accumulate": 5}, 2)],
)  # fmt: skip
def test_steps_and_epochs(program: gw.Program, data: Data, options, steps: int) -> None:
    assert tune(program, data(8), TuneOptions(**options), Context()).history.steps == steps


def test_bfloat16_trains_float32_parameters(program: gw.Program, data: Data) -> None:
    full, half = (
        tune(program, data(8), plain(epochs=4, lr=0.01, precision=p), Context())
        for p in ("fp32", "bf16")
    )
    assert {t.dtype for t in half.program.state.values()} == {torch.float32}
    assert half.history.losses != full.history.losses
    # bfloat16 keeps 8 bits of a number
    assert half.history.losses == pytest.approx(full.history.losses, rel=0.05)


def test_early_stop_returns_the_best(program: gw.Program, data: Data) -> None:
    values, seen = iter([3.0, 2.0, 2.5, 2.0, 9.0, 1.0]), []

    def evaluate(current: gw.Program) -> float:
        seen.append(state(current))
        return next(values)

    options = TuneOptions(steps=12, evaluate_every=2, patience=3)
    tuned = tune(program, data(8), options, Context(), evaluate=evaluate)
    assert tuned.history.evaluations == ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0), (10, 9.0))
    assert (tuned.history.best_step, tuned.history.steps) == (4, 10)
    assert tuned.history.stopped == "no better evaluation in the last 3"
    for name, tensor in tuned.program.state.items():
        assert torch.equal(tensor, seen[1][name])


def test_the_last_step_is_kept_when_asked_for(program: gw.Program, data: Data) -> None:
    seen, values = [], iter([1.0, 2.0])

    def evaluate(current: gw.Program) -> float:
        seen.append(state(current))
        return next(values)

    options = TuneOptions(epochs=2, keep_best=False)
    tuned = tune(program, data(8), options, Context(), evaluate=evaluate)
    assert tuned.history.best_step == 6
    for name, tensor in tuned.program.state.items():
        assert torch.equal(tensor, seen[1][name])


def test_the_evaluation_is_the_loss_on_held_out_samples(program: gw.Program, data: Data) -> None:
    class Samples(Hook):
        seen: list[torch.Tensor] = []  # noqa: RUF012

        def on_loss(self, at: Moment, loss, outputs, batch) -> torch.Tensor:
            self.seen.append(batch["x"])
            return loss

    options = TuneOptions(epochs=4, hold_out=0.25, lr=0.01)
    tuned = tune(program, data(5), options, Context(), hooks=[Samples()])
    trained = {tuple(row.flatten().tolist()) for row in torch.cat(Samples.seen)}
    x, labels = lab.images()
    out = torch.tensor([tuple(row.flatten().tolist()) not in trained for row in x])
    assert int(out.sum()) == 12
    loss = F.cross_entropy(tuned.program(x[out]), labels[out]).item()
    best = min(value for _, value in tuned.history.evaluations)
    assert best == pytest.approx(loss, rel=1e-5)


def test_a_student_follows_its_teacher(program: gw.Program) -> None:
    torch.manual_seed(5)
    teacher = lab.traced(lab.Net().eval(), 4, 1, 4, 4)
    x, _ = lab.images()
    batches = [(part,) for part in x.split(8)]
    options = TuneOptions(epochs=15, lr=0.02, loss="kl")
    tuned = tune(program, batches, options, Context(teacher=teacher))

    def distance(student: gw.Program) -> float:
        logs = F.log_softmax(student(x), 1), F.log_softmax(teacher(x), 1)
        return F.kl_div(*logs, reduction="batchmean", log_target=True).item()

    assert distance(tuned.program) < 0.2 * distance(program)
    assert distance(teacher) == 0


def test_progress_ends_at_the_last_step(program: gw.Program, data: Data) -> None:
    calls = []
    context = Context(progress=lambda *call: calls.append(call))
    tuned = tune(program, data(8), TuneOptions(steps=5), context)
    assert calls[-1] == (f"loss {tuned.history.losses[-1]:.4g}", 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "patience needs an evaluation. Set hold_out to a share of the samples."),
        ({"evaluate_every": 2}, "evaluate_every needs an evaluation"),
        ({"warmup": 6}, "a warm-up of 6 steps leaves none of 6 to train"),
        ({"accumulate": 7}, "table: 1 epochs hold fewer batches than the 7 of one step"),
        ({"loss": "kl"}, "the loss kl needs a teacher"),
    ],
)
def test_options_that_do_not_go_together(
    program: gw.Program, data: Data, options, message: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        tune(program, data(8), TuneOptions(**options), Context())
    assert str(caught.value).startswith(message)


def test_a_loss_that_diverges_names_its_step(program: gw.Program, data: Data) -> None:
    class Break(Hook):
        def on_loss(self, at: Moment, loss, outputs, batch) -> torch.Tensor:
            return loss * float("nan") if at.step == 3 else loss

    with pytest.raises(ModelError) as caught:
        tune(program, data(8), TuneOptions(epochs=1), Context(), hooks=[Break()])
    assert str(caught.value) == (
        "the loss is nan in step 3. Lower `lr`, add `warmup` or set `clip_norm`."
    )


def test_what_cannot_be_trained(program: gw.Program, data: Data) -> None:
    def refused(given: gw.Program, names: list[str] | None = None) -> str:
        with pytest.raises(ModelError) as caught:
            tune(given, data(8), TuneOptions(), Context(), names=names)
        return str(caught.value)

    assert refused(program, ["fc.wieght"]) == (
        "parameter 'fc.wieght' cannot be trained: it is not in the program"
    )
    assert "is float16, whose updates round to nothing" in refused(
        program.replace(state={n: nn.Parameter(t.half()) for n, t in program.state.items()})
    )
    frozen = {n: t.detach() for n, t in program.state.items()}
    assert refused(program.replace(state=frozen)) == "the program has no trainable parameter"
