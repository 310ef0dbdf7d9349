"""Compare the compiled sentence encoder with the original, on the held-out texts.

    python docs/demo/compare.py DATA OUT

DATA is the folder that `prepare.py` filled, OUT the folder that `optimize` wrote. The artifact runs
in plain ONNX Runtime and the original in transformers; both are pooled to sentence embeddings (mean
over the tokens of the mask, normalized). Exit status 1 when the mean cosine is below 0.995.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from prepare import load_tokenizer, tokenize
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

LEAST_MEAN_COSINE = 0.995
BATCH = 8


def pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sentence embeddings of unit length. hidden: (batch, tokens, width); mask: (batch, tokens)."""
    weight = mask[..., None].astype(np.float64)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    unit: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def main(data: Path, out: Path) -> int:
    """Print the comparison."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    artifact = out / next(
        a["path"] for a in report["result"]["artifacts"] if a["backend"] == "onnxruntime"
    )
    session = onnxruntime.InferenceSession(str(artifact), providers=["CPUExecutionProvider"])
    disable_progress_bar()
    original = AutoModel.from_pretrained(data / "all-MiniLM-L6-v2").eval()
    tokenizer = load_tokenizer(data / "all-MiniLM-L6-v2")
    texts = (data / "held_out.txt").read_text(encoding="utf-8").splitlines()

    def embed(batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
        inputs = tokenize(tokenizer, batch)
        with torch.no_grad():
            before = original(**{k: torch.from_numpy(v) for k, v in inputs.items()})[0].numpy()
        wanted = {i.name for i in session.get_inputs()}
        after = session.run(None, {k: v for k, v in inputs.items() if k in wanted})[0]
        mask = inputs["attention_mask"]
        return pool(before, mask), pool(after, mask)

    def compare(batch_size: int) -> dict[str, float]:
        """Cosine of each text's two embeddings, and whose nearest other text stays the same."""
        pairs = [embed(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
        cosine = (before * after).sum(1)
        same = nearest(before) == nearest(after)
        return {
            "texts": len(texts),
            "batch": batch_size,
            "mean_cosine": float(cosine.mean()),
            "lowest_cosine": float(cosine.min()),
            "same_nearest": float(same.mean()),
        }

    print(f"\n{len(texts)} held-out texts, compiled against original")
    rows = [compare(size) for size in (1, BATCH)]
    for row in rows:
        print(
            f"  batch {row['batch']}: mean cosine {row['mean_cosine']:.6f}, lowest "
            f"{row['lowest_cosine']:.6f}, same nearest neighbour {row['same_nearest']:.0%}"
        )
    (out / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"  artifact: {artifact} ({artifact.stat().st_size / 1e6:.1f} MB)")
    print(f"  report:   {out / 'report.html'}")
    worst = min(row["mean_cosine"] for row in rows)
    if worst < LEAST_MEAN_COSINE:
        print(f"mean cosine {worst:.6f} is below {LEAST_MEAN_COSINE}", file=sys.stderr)
        return 1
    return 0


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """Index of each text's nearest other text. embeddings: (texts, width), unit length."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -1.0)
    found: np.ndarray = similarity.argmax(1)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
