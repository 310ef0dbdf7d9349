"""A pretrained model: SmolLM2 in its GGUF file, against transformers' own reading of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.smollm2 import folder, gguf_file

from graphwright.ir.files import load_model
from graphwright.ir.files.coded.modules import BlocksLinear

transformers = pytest.importorskip("transformers")


def test_the_file_is_the_model_of_its_dequantized_folder() -> None:
    file, place = gguf_file(), folder()
    loaded = load_model(file)
    module: Any = loaded.module
    reference = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
    ids = torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = module(ids).logits, reference(ids).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    coded = [part for part in module.modules() if isinstance(part, BlocksLinear)]
    assert len(coded) == 7 * 30 + 2
    assert module.lm_head.weight_codes is module.model.embed_tokens.weight_codes
    assert module.lm_head.bits == 8
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    ours = transformers.AutoTokenizer.from_pretrained(loaded.folder)
    text = "Déjà vu at 12:45, <|im_start|>\n\n\tx = f(y) 😀"
    assert ours(text).input_ids == theirs(text).input_ids
    chat = [{"role": "user", "content": "Hi"}]
    told = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for t in (ours, theirs)]  # fmt: skip
    assert told[0] == told[1]
    assert module.generation_config.eos_token_id == 2
