"""What the `exllamav2` adapter decides by itself, with a stand-in for the engine: no GPU, no ExLlamaV2."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from lmeval_ext import models
from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama import messages as exllama_messages

ADAPTER = "lmeval_ext.models.exllama.v2.adapter"
ORIGINAL = "the engine's own"


class Attention:
    """exllamav2.attn.ExLlamaV2Attention, as far as attention goes."""

    layer_idx = 0

    def __init__(self, groups: int = 2, window: int = 0) -> None:
        self.num_key_value_groups, self.sliding_window, self.scaling = groups, window, 0.3

    def repeat_kv(self, states: torch.Tensor, n: int) -> torch.Tensor:
        return states.repeat_interleave(n, dim=1)

    def _attn_torch(self, *arguments: Any) -> str:
        return ORIGINAL


class Cache:
    """exllamav2.ExLlamaV2Cache."""

    def __init__(self, model: Any, batch_size: int, max_seq_len: int) -> None:
        self.batch_size, self.max_seq_len = batch_size, max_seq_len


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter's module, imported anew on the stand-in."""
    names = {
        "": "ExLlamaV2 ExLlamaV2Cache_Q4 ExLlamaV2Cache_Q6 ExLlamaV2Cache_Q8 ExLlamaV2Config ExLlamaV2Tokenizer",
        ".compat": "safe_move_tensor",
        ".device": "set_device_streams",
        ".ext": "exllamav2_ext",
        ".generator": "ExLlamaV2DynamicGenerator ExLlamaV2DynamicJob ExLlamaV2Sampler",
        ".attn": "",
    }
    for name, words in names.items():
        module = types.ModuleType(f"exllamav2{name}")
        vars(module).update(dict.fromkeys(words.split(), type("Missing", (), {})))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    engine, attention = (sys.modules[name] for name in ("exllamav2", "exllamav2.attn"))
    vars(engine).update(ExLlamaV2Cache=Cache, attn=attention)
    vars(attention).update(
        ExLlamaV2Attention=type("ExLlamaV2Attention", (Attention,), {}),
        has_flash_attn=False,
        has_xformers=False,
        causal_lower_right=causal_lower_right,
    )
    monkeypatch.setattr(exllama_messages, "require", lambda *a: None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)
    if hasattr(models, "exllamav2"):
        delattr(models, "exllamav2")


# ---------------------------------------------------------------------- attention


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any) -> torch.Tensor:
    """Softmax of q·k over each query's own keys, one head and one query at a time, in float64."""
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
    torch.manual_seed(0)
    return [torch.randn(2, n, heads, 8) for n, heads in ((q_len, 4), (k_len, 2), (k_len, 2))]


def params(causal: bool = True) -> Any:
    return types.SimpleNamespace(is_causal=lambda: causal, block_diag_layers=set())


def settings(**given: Any) -> Any:
    """Of ExLlamaV2Config, what attention asks for."""
    rest = {"no_flash_attn": False, "no_xformers": False, "no_sdpa": False, "attn_logit_softcapping": None}
    return types.SimpleNamespace(**rest | given)


@pytest.mark.parametrize("window", [0, 4, 9, 20])
@pytest.mark.parametrize(("q_len", "k_len"), [(9, 9), (3, 9), (1, 9), (1, 1)])
def test_attention_is_causal(v2: Any, q_len: int, k_len: int, window: int) -> None:
    layer, (q, k, v) = Attention(window=window), states(q_len, k_len)
    out = v2.causal_attention(layer, 2, q_len, q, k, v, params(), settings())
    torch.testing.assert_close(out, by_hand(q, k, v, layer).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [settings(attn_logit_softcapping=50.0), settings(no_sdpa=True)])
def test_what_pytorch_cannot_do_is_the_engines(v2: Any, config: Any) -> None:
    def attend(q_len: int, k_len: int, window: int) -> Any:
        return v2.causal_attention(Attention(window=window), 2, q_len, *states(q_len, k_len), params(), config)

    assert attend(9, 9, 0) == attend(9, 9, 9) == attend(1, 9, 4) == ORIGINAL
    # Its products keep the last four keys for all nine queries
    with pytest.raises(
        UserError, match=r"9 tokens: .* sliding window of 4; lower eval_len or max_length to 4, or install"
    ):
        attend(9, 9, 4)


@pytest.mark.parametrize(
    ("installed", "config", "expected"),
    [
        ("flash_attn xformers", settings(), "flash-attn"),
        ("flash_attn xformers", settings(no_flash_attn=True), "xformers"),
        ("flash_attn", settings(no_flash_attn=True), "torch SDPA"),
        ("xformers", settings(no_xformers=True), "torch SDPA"),  # Cohere 2, Gemma 3
        ("xformers", settings(no_xformers=True, attn_logit_softcapping=50.0), "torch matmul"),  # Gemma 2
        ("", settings(no_sdpa=True), "torch matmul"),
        ("", settings(), "torch SDPA"),
        ("", None, "torch SDPA"),
        ("xformers", None, "xformers"),
    ],
)
def test_what_attends_is_masked_and_named(v2: Any, installed: str, config: Any, expected: str) -> None:
    for name in installed.split():
        setattr(v2.v2_attention, f"has_{name}", True)
    assert v2.repair_attention(config) == expected
    assert v2.v2_attention.ExLlamaV2Attention._attn_torch is v2.causal_attention


# ---------------------------------------------------------------------- lengths and memory


@pytest.mark.parametrize(
    ("own", "asked", "method", "max_length", "max_seq_len", "tokens"),
    [
        (131072, None, "llama3", 16352, 16384, 16384),
        (131072, 32768, "llama3", 32768, 32768, 34816),  # and the padding of a row, in pieces of 2048
        (131072, 2000, None, 2000, 2048, 16384),
        (131072, 100, None, 100, 256, 16384),
        (131072, 2048, "su", 2048, 131072, 16384),  # whose scaling goes by the longest
        (8192, None, None, 8192, 8192, 16384),
        (8192, 10000, None, 10000, 10240, 16384),
    ],
)
def test_buffers_follow_the_longest_sequence(
    v2: Any,
    own: int,
    asked: int | None,
    method: str | None,
    max_length: int,
    max_seq_len: int,
    tokens: int,
    caplog: Any,
) -> None:
    model = object.__new__(v2.ExLlamaV2Model)
    model.asked_length, model._max_length, model._batch_size = asked is not None, asked or own, "auto"
    config = types.SimpleNamespace(max_seq_len=own, alt_rope_method=method)
    model._set_lengths(config)
    assert (model.max_length, config.max_seq_len) == (max_length, max_seq_len)
    assert config.max_input_len * config.max_batch_size == tokens
    assert ("max_length=16352 of this model's 131072" in caplog.text) == (asked is None and own > 16352)


def test_the_engines_own_limit_counts_where_none_is_asked_for(v2: Any) -> None:
    """ExLlamaV2 takes 2048 where config.json names no length in words that it reads."""
    model = object.__new__(v2.ExLlamaV2Model)
    model.asked_length, model._max_length, model._batch_size = False, 4096, 64
    config = types.SimpleNamespace(max_seq_len=2048, alt_rope_method=None)
    model._set_lengths(config)
    assert (model.max_length, config.max_seq_len) == (2048, 2048)
    assert config.max_batch_size == 64  # as asked


def test_rows_and_lengths_of_different_questions_do_not_multiply(v2: Any) -> None:
    engine = object.__new__(v2.ExLlamaV2Engine)
    engine.model, engine._trunk, engine._leaves, engine._held = None, None, None, [1, 2]

    def shapes(rows: int, length: int) -> list[tuple[int, int]]:
        engine._make_caches(rows, length)
        return [(c.batch_size, c.max_seq_len) for c in (engine._trunk, engine._leaves)]

    assert shapes(2, 8000) == [(1, 8192), (4, 8192)]
    assert engine._held == []
    engine._held = [1, 2]
    assert shapes(40, 250) == [(1, 8192), (40, 256)]
    kept = engine._leaves
    assert shapes(30, 200) == [(1, 8192), (40, 256)]
    assert engine._leaves is kept
    assert shapes(4, 1000) == [(1, 8192), (4, 1024)]
    assert engine._held == [1, 2]
    kept = engine._leaves
    engine._trunk = Cache(None, 1, 512)
    assert shapes(4, 1000) == [(1, 1024), (4, 1024)]
    assert engine._leaves is kept
