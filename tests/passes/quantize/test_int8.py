from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, GraphwrightError, ModelError

CHAIN = ("conv", [("cleanup.fold_batch_norm", {}), ("quantize.int8", {"activations": "static"})])

ops = torch.ops.graphwright
aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.q = nn.Linear(32, 32)
        self.k = nn.Linear(32, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.embed(ids))
        return self.head(torch.tanh(self.q(h) + self.k(h)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        h = torch.relu(self.b(h) + h)
        return self.fc(nn.functional.max_pool2d(h, 2).flatten(1))


@pytest.fixture(scope="module")
def block() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Block().eval(), (torch.randint(0, 50, (4, 6)),), {"ids": {0: "n", 1: "s"}})


@pytest.fixture(scope="module")
def cnn() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Cnn().eval(), (torch.randn(4, 3, 8, 8),), {"x": {0: "n"}})


def images() -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator),) for _ in range(3)]


def targets(program: gw.Program) -> list[object]:
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def test_dynamic_quantizes_each_activation_once_and_is_near(block: gw.Program) -> None:
    after = gw.passes.quantize.Int8()(block)
    found = targets(after)
    # q and k read one quantizer; head reads another.
    assert found.count(ops.fake_quantize_dynamic.default) == 2
    assert found.count(ops.dequantize.default) == 4
    assert measure(block, after).relative < 0.05
    assert {t.dtype for n, t in after.state.items() if n.endswith("codes")} == {torch.int8}


def test_weights_are_exactly_what_the_codes_say(block: gw.Program) -> None:
    after = gw.passes.quantize.Int8(any_cpu=False)(block)
    for name in ("q.weight", "embed.weight"):
        codes, scale = after.state[f"{name}_codes"], after.state[f"{name}_scale"]
        expected = codes.double() * scale.double()[:, None]
        got = ops.dequantize(codes, scale, None, 0)
        assert torch.equal(got, expected.float())
        w = block.state[name].detach().double()
        assert bool(((expected - w).abs() <= scale.double()[:, None] / 2 * (1 + 1e-6)).all())


def test_dynamic_fake_quantization_follows_onnx() -> None:
    x = torch.randn(7, 5) * 3 + 1
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = torch.tensor((high - low) / 255, dtype=torch.float32)
    zero = torch.round(-low / scale).clamp(0, 255)
    expected = ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale
    assert torch.allclose(ops.fake_quantize_dynamic(x), expected, atol=float(scale) * 1e-4)


def test_every_selected_layer_is_listed_with_what_was_done(cnn: gw.Program) -> None:
    result = gw.passes.quantize.Int8().execute(cnn, Context())
    said = {a.layer: (a.what, a.reason) for a in result.actions}
    assert said["a"][0] == "float32"
    assert "static" in said["a"][1]
    assert said["fc"][0].startswith("int8 dynamic, relative error ")


def test_static_integer_convolutions_run_in_onnx_runtime(cnn: gw.Program) -> None:
    quantized = gw.passes.quantize.Int8(activations="static")(cnn, calibration=images())
    assert measure(cnn, quantized, images()).snr_db > 20  # 25 dB is typical; small random net
    compiled = gw.lower(quantized, "onnxruntime")
    kernels = compiled.notes["kernels"]
    assert kernels.get("QLinearConv") == 2
    assert "Conv" not in kernels
    assert "FusedConv" not in kernels
    assert "MatMul" not in kernels
    assert "Gemm" not in kernels
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        reference = quantized(x)
    # Fused and unfused kernels may round a code to its neighbour; a dozen of them in a row.
    assert float((compiled(x) - reference).norm() / reference.norm()) < 0.02


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_integer_products_run_in_onnx_runtime(block: gw.Program, activations: str) -> None:
    batches = [(torch.randint(0, 50, (4, 7)),) for _ in range(3)]
    step = gw.passes.quantize.Int8(activations=activations)
    quantized = step(block, calibration=batches)
    compiled = gw.lower(quantized, "onnxruntime")
    kernels = compiled.notes["kernels"]
    products = kernels.get("MatMulIntegerToFloat", 0) + kernels.get("DynamicQuantizeMatMul", 0)
    assert products == 3
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(kernels)
    assert compiled(torch.randint(0, 50, (2, 9))).shape == (2, 9, 8)


def test_digits_keep_their_accuracy() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(16):
        for batch in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    program = gw.trace(model.eval(), (x[:4],), {"input": {0: "n"}})
    step = gw.passes.quantize.Int8(activations="static", activation_range="mse")
    quantized = step(program, calibration=[(x[:256],)])

    def accuracy(run: object) -> float:
        return float((run(x[1400:]).argmax(1) == y[1400:]).float().mean())  # type: ignore[operator]

    assert accuracy(program) > 0.9
    assert accuracy(quantized) >= accuracy(program) - 0.01


def test_a_tied_weight_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    program = gw.trace(Tied().eval(), (torch.randint(0, 20, (2, 3)),), {"ids": {0: "n"}})
    after = gw.passes.quantize.Int8()(program)
    assert [n for n in after.state if n.endswith("codes")] == ["embed.weight_codes"]


@pytest.mark.parametrize(
    ("options", "calibration", "error", "says"),
    [
        ({"activations": "static"}, None, ArgumentError, "calibration"),
        ({"activations": "static"}, [(torch.full((2, 3, 8, 8), float("nan")),)], GraphwrightError,
         "NaN"),
        ({"targets": ["nothing.*"]}, None, ModelError, "matches no layer"),
        ({"targets": ["a", "b"]}, None, ModelError, "can quantize none"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(cnn, options, calibration, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        gw.passes.quantize.Int8(**options)(cnn, calibration=calibration)


def test_a_constant_activation_has_a_scale_of_its_own(cnn: gw.Program) -> None:
    batches = [(torch.zeros(2, 3, 8, 8),)]
    quantized = gw.passes.quantize.Int8(activations="static")(cnn, calibration=batches, check=False)
    assert bool(torch.isfinite(quantized(torch.zeros(2, 3, 8, 8))).all())


def test_only_layers_that_can_overflow_give_up_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3), nn.Linear(6, 6))
    x = torch.randn(4, 8, 10, 10)
    program = gw.trace(model.eval(), {"input": x})
    held, free = (
        gw.passes.quantize.Int8(activations="static", any_cpu=any_cpu)(
            program, calibration=[{"input": x}]
        ).state
        for any_cpu in (True, False)
    )
    same = {n: torch.equal(held[n], free[n]) for n in held if n.endswith("weight_codes")}
    assert same == {"0.weight_codes": True, "1.weight_codes": False, "2.weight_codes": False}
    # Neighbours of the sum are the input channels of one place of the window.
    rows = held["1.weight_codes"].movedim(1, -1).reshape(16, -1, 2).int()
    assert int((rows.sum(-1)).abs().max()) <= 128


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("estimator", ["min_max", "percentile", "moving_average"])
def test_padding_tokens_have_no_part_in_the_ranges(estimator: str) -> None:
    torch.manual_seed(3)
    mask = (torch.arange(8) < torch.tensor([[3], [8], [5]])).long()
    x = torch.randn(3, 8, 16)
    program = gw.trace(Masked().eval(), (x, mask))
    other = torch.where(mask[..., None] == 1, x, 100 * torch.randn(3, 8, 16))
    made = gw.passes.quantize.Int8(activations="static", activation_range=estimator)
    results = [made(program, calibration=[(v, mask)], check=False) for v in (x, other)]
    scales = [
        [n.args[1] for n in r.graph.nodes if n.target is ops.fake_quantize.default] for r in results
    ]
    assert scales[0]
    assert [str(s) for s in scales[0]] == [str(s) for s in scales[1]]
    same = [torch.equal(results[0].state[n], t) for n, t in results[1].state.items()]
    assert all(same)
    # data that is padding alone is still better than none
    made(program, calibration=[(x, torch.zeros_like(mask))], check=False)
