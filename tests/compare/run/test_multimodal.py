"""`transformers_mm`: the text part of a multimodal model, against Transformers' own logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compare.run.specs.engines import LOAD_FNS
from tests.conftest import VOCABULARY, evaluate, make_tokenizer


@pytest.mark.engine
def test_text_part_of_a_multimodal_model_matches_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from lmeval_ext.tasks.corpus import SAMPLE, read_corpus

    make_tokenizer(tmp_path)
    text = LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCABULARY)
    ).eval()
    model.save_pretrained(tmp_path)
    arguments = LOAD_FNS["transformers_mm"].args | {
        "dtype": "float32",
        "parallelize": True,
    }  # a CPU has nothing to spread over
    settings = {"eval_len": 64, "stride": 64, "max_rows": 2}
    result = evaluate("hf_quant", "sample_strided", metadata=settings, pretrained=str(tmp_path), **arguments)

    ids = AutoTokenizer.from_pretrained(tmp_path)("\n\n".join(read_corpus(SAMPLE).rows), return_tensors="pt").input_ids
    total = 0.0
    for start in (0, 64):
        window = ids[:, start : start + 64]
        with torch.no_grad():
            logits = model(window).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    perplexity = result["results"]["sample_strided"]["token_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(total / 126), rel=1e-4)
