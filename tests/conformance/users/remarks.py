"""Failures that were looked into, in plain words; the page puts them before the message."""

from __future__ import annotations

VALUES = "Its code turns values of a tensor into numbers, which a graph cannot hold"

REMARKS = {
    "timm.nfnet_l0": "With random weights float32 itself loses 1.5% of the output, and ONNX "
    "Runtime 11%, which is never called rounding",
    "spandrel.ATD": "Its code loops over the batch in Python",
    "kornia.DeFMO": "Its code makes a Python list of the batch",
    "torchaudio.Conformer": f"{VALUES} (the largest of the lengths given)",
    "torchaudio.Emformer": f"{VALUES} (the largest of the lengths given)",
    "demucs.HTDemucs": f"{VALUES} (an `assert` on padded values)",
    "vocos.istft_head": f"{VALUES} (an `assert` on the sum of windows)",
    "asteroid.DCUNet": f"{VALUES} (strides that it holds in a tensor)",
    "speechbrain.Xvector": "It adds noise in eval mode too, so that no two runs are equal",
}
