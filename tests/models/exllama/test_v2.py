"""Repairs of ExLlamaV2 (attention, rotary embeddings, buffer lengths), without a GPU and without the engine."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.v2.loading import set_lengths
from lmeval_ext.models.exllama.v2.rope import read_rope, set_rope
from tests.models.exllama.stand_ins import ORIGINAL_ATTENTION, Attention, adapter_module, install_exllamav2


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yields the module `v2.attention`, imported again on a stand-in for the engine."""
    install_exllamav2(monkeypatch)
    with adapter_module("v2", "attention") as module:
        yield module


# ---------------------------------------------------------------------- attention


def attention_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any) -> torch.Tensor:
    """Returns softmax(q·k)·v over each query's keys, one head and one query at a time, in float64."""
    rows, q_len, heads, dim = q.shape
    out = torch.zeros(rows, q_len, heads, dim, dtype=torch.float64)
    for i in range(q_len):
        last = k.shape[1] - q_len + i
        first = max(0, last - layer.sliding_window + 1) if layer.sliding_window else 0
        for h in range(heads):
            keys, values = (t[:, first : last + 1, h // layer.num_key_value_groups].double() for t in (k, v))
            weights = (torch.einsum("bd,bkd->bk", q[:, i, h].double(), keys) * layer.scaling).softmax(-1)
            out[:, i, h] = torch.einsum("bk,bkd->bd", weights, values)
    return out.flatten(2)


def states(q_len: int, k_len: int) -> list[torch.Tensor]:
    """Returns random q, k and v: [2 rows, length, heads, 8], with 4 heads of q for 2 of k and v."""
    torch.manual_seed(0)
    return [torch.randn(2, n, heads, 8) for n, heads in ((q_len, 4), (k_len, 2), (k_len, 2))]


def params(causal: bool = True) -> Any:
    """Returns the attention parameters of one batch."""
    return types.SimpleNamespace(is_causal=lambda: causal, block_diag_layers=set())


def attention_config(**given: Any) -> Any:
    """Returns the fields of ExLlamaV2Config that attention reads."""
    rest = {"no_flash_attn": False, "no_xformers": False, "no_sdpa": False, "attn_logit_softcapping": None}
    return types.SimpleNamespace(**rest | given)


@pytest.mark.parametrize("window", [0, 4, 9, 20])
@pytest.mark.parametrize(("q_len", "k_len"), [(9, 9), (3, 9), (1, 9), (1, 1)])
def test_attention_equals_causal_attention_by_hand(attention: Any, q_len: int, k_len: int, window: int) -> None:
    layer, (q, k, v) = Attention(window=window), states(q_len, k_len)
    out = attention.causal_attention(layer, 2, q_len, q, k, v, params(), attention_config())
    torch.testing.assert_close(out, attention_by_hand(q, k, v, layer).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [attention_config(attn_logit_softcapping=50.0), attention_config(no_sdpa=True)])
def test_attention_that_pytorch_cannot_compute_is_left_to_the_engine(attention: Any, config: Any) -> None:
    def attend(q_len: int, k_len: int, window: int) -> Any:
        return attention.causal_attention(Attention(window=window), 2, q_len, *states(q_len, k_len), params(), config)

    assert attend(9, 9, 0) == attend(9, 9, 9) == attend(1, 9, 4) == ORIGINAL_ATTENTION
    # The engine would use the last four keys for all nine queries
    with pytest.raises(
        UserError, match=r"9 tokens: .* sliding window of 4; lower eval_len or max_length to 4, or install"
    ):
        attend(9, 9, 4)


@pytest.mark.parametrize(
    ("installed", "config", "expected"),
    [
        ("flash_attn xformers", attention_config(), "flash-attn"),
        ("flash_attn xformers", attention_config(no_flash_attn=True), "xformers"),
        ("flash_attn", attention_config(no_flash_attn=True), "torch SDPA"),
        ("xformers", attention_config(no_xformers=True), "torch SDPA"),  # Cohere 2, Gemma 3
        ("xformers", attention_config(no_xformers=True, attn_logit_softcapping=50.0), "torch matmul"),  # Gemma 2
        ("", attention_config(no_sdpa=True), "torch matmul"),
        ("", attention_config(), "torch SDPA"),
        ("", None, "torch SDPA"),
        ("xformers", None, "xformers"),
    ],
)
def test_attention_is_replaced_and_its_library_named(
    attention: Any, installed: str, config: Any, expected: str
) -> None:
    for name in installed.split():
        setattr(attention.v2_attention, f"has_{name}", True)
    assert attention.repair_attention(config) == expected
    assert attention.v2_attention.ExLlamaV2Attention._attn_torch is attention.causal_attention


# ---------------------------------------------------------------------- rotary embeddings


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 8192}


def v2_config() -> Any:
    """Returns the fields that ExLlamaV2Config.prepare() of 0.3.2 sets for a config of Transformers 5."""
    return types.SimpleNamespace(
        rotary_embedding_base=10000.0, scale_pos_emb=1.0, alt_rope_method=None, partial_rotary_factor=1.0
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, {"rotary_embedding_base": 1e5}),
        ({"rope_theta": 5e5}, {"rotary_embedding_base": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rotary_embedding_base": 5e5, "scale_pos_emb": 1.0}),
        ({"text_config": {"rope_parameters": {"rope_theta": 7e4}}}, {"rotary_embedding_base": 7e4}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}, {"scale_pos_emb": 4.0}),
        (
            {"rope_parameters": {**LLAMA3, **ORIGINAL, "rope_theta": 5e5}},
            {"alt_rope_method": "llama3", "l3_rope_factor": 8.0, "l3_rope_original_max_position_embeddings": 8192},
        ),
        (
            {
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [2.0], "short_factor": [1.0]},
            },
            {"alt_rope_method": "su", "scale_long_factor": [2.0], "original_max_seq_len": 4096},
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotary_embeddings_of_both_config_formats_are_set(config: dict[str, Any], expected: dict[str, Any]) -> None:
    v2 = v2_config()
    set_rope(v2, config, "model")
    assert {name: getattr(v2, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}, "of the kind 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of the kind 'dynamic'"),
        ({"rope_parameters": LLAMA3}, "has no original_max_position_embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differ by layer type"),
    ],
)
def test_rotary_embeddings_unknown_to_exllamav2_are_errors(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^model: .*{words}"):
        set_rope(v2_config(), config, "model")


@pytest.mark.engine
def test_rope_of_a_checkpoint_saved_by_transformers_is_read(tiny_llama: Path) -> None:
    """Transformers 5 does not write a top-level rope_theta, the only one that ExLlamaV2 reads."""
    config = json.loads((tiny_llama / "config.json").read_text())
    assert read_rope(config).theta == 10000.0
    assert "rope_theta" not in config, "Transformers writes it again: ExLlamaV2 may read it by itself"


# ---------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("own", "given", "method", "max_length", "max_seq_len", "tokens"),
    [
        (131072, None, "llama3", 16352, 16384, 16384),
        (131072, 32768, "llama3", 32768, 32768, 34816),  # with the padding of a row, in pieces of 2048
        (131072, 2000, None, 2000, 2048, 16384),
        (131072, 100, None, 100, 256, 16384),
        (131072, 2048, "su", 2048, 131072, 16384),  # its scaling depends on the longest sequence
        (8192, None, None, 8192, 8192, 16384),
        (8192, 10000, None, 10000, 10240, 16384),
    ],
)
def test_buffers_follow_the_longest_sequence(
    own: int, given: int | None, method: str | None, max_length: int, max_seq_len: int, tokens: int, caplog: Any
) -> None:
    config = types.SimpleNamespace(max_seq_len=own, alt_rope_method=method)
    assert set_lengths(config, given or own, given is not None, "auto") == max_length
    assert config.max_seq_len == max_seq_len
    assert config.max_input_len * config.max_batch_size == tokens
    assert ("max_length=16352 of this model's 131072" in caplog.text) == (given is None and own > 16352)


def test_default_length_is_within_the_limit_of_the_engine() -> None:
    """ExLlamaV2 takes 2048 if it finds no length in config.json. batch_size=64 makes room for 64 rows."""
    config = types.SimpleNamespace(max_seq_len=2048, alt_rope_method=None)
    assert set_lengths(config, 4096, False, 64) == config.max_seq_len == 2048
    assert config.max_batch_size == 64
