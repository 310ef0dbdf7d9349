"""A small run's report, with names in it that a hostile model could have."""

from types import SimpleNamespace

import torch
from torch import nn

from graphwright.ir.check.fidelity import compare
from graphwright.ir.trace.capture import trace
from graphwright.report.build import build_report

HOSTILE = "</style><script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def programs():
    """(original, result): the weights of the later layers rounded to two decimals."""
    torch.manual_seed(0)
    original = trace(Net(), [torch.randn(2, 8)], {"x": {0: "batch"}})
    state = {
        name: nn.Parameter((tensor * 100).round() / 100) if "blocks" in name else tensor
        for name, tensor in original.state.items()
    }
    return original, original.replace(state=state)


def sample_report(original, result, **changes):
    fidelity = compare(original(*original.examples), result(*original.examples))
    parts = {
        "source": SimpleNamespace(source=f"models/{HOSTILE}.pt2", sha256="0" * 64),
        "original": original,
        "program": result,
        "passes": [
            {
                "id": "quantize.round", "options": {"decimals": 2, HOSTILE: HOSTILE},
                "contract": "lossy", "seconds": 1.5, "peak_rss_bytes": 10**9,
                "error": fidelity.as_dict(), "metrics": {"mean": float("nan")},
                "actions": [["blocks.0", "rounded", "", True], [HOSTILE, "kept", HOSTILE, False]],
            }
        ],
        "artifacts": [{"backend": "onnxruntime", "path": "model.onnx", "file_bytes": 2000}],
        "fidelity": fidelity,
        "evaluation": {"metric": "snr_db", "before": None, "after": 31.4, "drop": None},
        "latency": [
            {
                "backend": "onnxruntime", "device": "cpu", "threads": 2, "before_ms": 2.0,
                "after_ms": 0.5, "speedup": 4.0, "before_iqr_ms": 0.1, "after_iqr_ms": 0.02,
                "runs": 100, "shapes": [[2, 8]],
            }
        ],
        "notes": {
            "onnxruntime": {
                "kernels": {"MatMul": 6, HOSTILE: 1}, "left": [HOSTILE, {"why": HOSTILE}],
                "opset": 21, "load_ms": 3.25, "nested": {"a": [1, 2]}, "empty": [],
            }
        },
        "require": [
            {"name": "min_speedup", "bound": 5.0, "measured": 4.0, "what": "onnxruntime",
             "met": False},
            {"name": "max_drop", "bound": 0.1, "measured": None, "what": "", "met": False},
        ],
        "code": [],
        "warnings": [f"weight {HOSTILE} holds NaN"],
        "seconds": 12.0,
        "peak_rss_bytes": 2 * 10**9,
        "environment": {"graphwright": "0.1.0", "threads": 2},
    }  # fmt: skip
    return build_report(**{**parts, **changes})
