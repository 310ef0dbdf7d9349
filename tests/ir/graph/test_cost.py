"""Counts against torch's own flop counter, and against formulas by hand."""

import pytest
import sympy
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphwright.ir.ops  # noqa: F401  (registers the custom ops)
from graphwright.ir.edit import Editor
from graphwright.ir.graph.cost import cost
from graphwright.ir.trace.capture import trace


def counted_by_torch(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, stride=2), nn.Conv2d(8, 16, 1, dilation=2),
        nn.ConvTranspose2d(16, 6, 4, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 10),
    )  # fmt: skip


def volumes():
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding="same"), nn.ConvTranspose3d(4, 3, 2, stride=2), nn.Flatten(2),
        nn.Conv1d(3, 6, 5, groups=3), nn.ConvTranspose1d(6, 4, 3),
    )  # fmt: skip


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 7))

    def forward(self, x, y):  # (b, 5, 6), (b, 6, 5)
        z = torch.bmm(x, y) + torch.baddbmm(x.sum(2, keepdim=True), x, y)
        z = z + torch.einsum("bij,bjk->bik", x, y) + torch.einsum("...ij,...jk", x, y)
        m = torch.matmul(x, self.weight)
        return z.sum() + m.sum() + torch.addmm(x[0, 0, 0], x[0], y[0]).sum() + torch.mm(x[0], y[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)

    def forward(self, x):
        b, s, _ = x.shape
        q, k = (f(x).view(b, s, 2, 8).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).view(b, s, 2, 12).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (conv_net, [(2, 3, 12, 12)]),
        (volumes, [(2, 2, 4, 4, 4)]),
        (Products, [(3, 5, 6), (3, 6, 5)]),
        (Attention, [(2, 9, 16)]),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), [(2, 7, 16)]),
    ],
    ids=["conv2d", "conv1d-3d", "products", "attention", "encoder"],
)
def test_equal_to_torch_flop_counter(make, inputs):
    torch.manual_seed(0)
    model, tensors = make().eval(), [torch.randn(s) for s in inputs]
    found = cost(trace(model, tensors))
    if isinstance(model, nn.TransformerEncoderLayer):
        model.train().requires_grad_(False)  # the counter does not see eval's fused fast path
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        with FlopCounterMode(display=False) as counter:
            model(*tensors)
        expected = counter.get_total_flops() // 2
    else:
        expected = counted_by_torch(model, tensors)
    assert found.macs == expected > 0
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.parameters for layer in found.layers) == found.parameters


def test_transformers_model_equals_torch_flop_counter():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dims = {name: {0: "batch", 1: "seq"} for name in inputs}
    found = cost(trace(model, inputs, dims))
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # the counter does not know the CPU's flash kernel
    ):
        model(**inputs)
    assert found.macs == counter.get_total_flops() // 2
    assert found.parameters == sum(p.numel() for p in model.parameters())
    # the formula holds at another size too
    longer = {name: torch.ones(3, 11, dtype=torch.int64) for name in inputs}
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(**longer)
    value = sympy.sympify(found.formula).subs({"batch": 3, "seq": 11})
    assert value == counter.get_total_flops() // 2


# torch.export remarks on the weights that nn.LSTM keeps a list of
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_lstm_by_hand():
    model = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True, proj_size=3)
    found = cost(trace(model, [torch.randn(2, 6, 5)]))
    h, p = 4, 3
    per_step = 2 * (4 * h * (5 + p) + h * p) + 2 * (4 * h * (2 * p + p) + h * p)
    assert found.macs == 2 * 6 * per_step
    assert found.parameters == sum(w.numel() for w in model.parameters())


def test_symbolic_formula():
    program = trace(nn.Linear(3, 5), [torch.randn(2, 4, 3)], {"input": {0: "batch", 1: "seq"}})
    found = cost(program)
    assert sympy.sympify(found.formula) == sympy.sympify("15*batch*seq")
    assert found.macs == 15 * 2 * 4
    assert found.sizes == {"batch": 2, "seq": 4}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(10, dtype=torch.float64))

    def forward(self, ids):
        return self.head(self.embed(ids)) * self.scale


def test_tied_weight_counts_once():
    found = cost(trace(Tied(), [torch.zeros(2, 3, dtype=torch.int64)]))
    assert found.parameters == 40
    assert found.weight_bytes == 40 * 4 + 10 * 8
    assert {layer.name: layer.parameters for layer in found.layers if layer.parameters} == {
        "embed": 40
    }
    assert [layer.kind for layer in found.layers if layer.macs] == ["linear"]


def test_integer_codes_count_the_values_they_rebuild():
    """A fused int8 layer: codes are weights, scales are not, and its product is counted."""
    model = nn.Linear(6, 5)
    program = trace(model, [torch.randn(2, 6)])
    editor = Editor(program, by="test")
    (node,) = (n for n in editor.graph.nodes if n.op == "call_function")
    x, _, bias = node.args
    codes = editor.get(editor.add_state("codes", torch.ones(5, 6, dtype=torch.int8)))
    scale = editor.get(editor.add_state("scale", torch.ones(5)))
    target = torch.ops.graphwright.int8_linear.default
    editor.replace(node, editor.call(target, x, codes, scale, bias, "none", before=node, like=node))
    found = cost(editor.finish())
    assert found.parameters == 30 + 5
    assert found.weight_bytes == 30 + 5 * 4 + 5 * 4
    assert found.macs == 2 * 6 * 5
