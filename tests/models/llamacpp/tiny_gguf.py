"""Tiny random GGUF models of several architectures, written with gguf's own writer, and their tokenizer.

The vocabulary has one token per byte, two merges and three special tokens. Weights are float32 and large enough for
log-probabilities to differ between positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.storage.builders import finish_gguf

WIDTH, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 128, 2
HEAD = WIDTH // HEADS
SPECIAL = ("<s>", "</s>", "<unk>")
MERGES = ["Ġ t", "h e"]
Tensors = dict[str, np.ndarray]


def _bytes() -> list[str]:
    """The character of each byte in GPT-2's byte-level vocabularies."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def vocabulary() -> list[str]:
    return [*SPECIAL, *_bytes(), *(merge.replace(" ", "") for merge in MERGES)]


def write_tokenizer(folder: Path) -> Path:
    """Writes the Transformers tokenizer with the same vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary())}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    names = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def write(
    path: Path,
    architecture: str,
    tensors: Tensors,
    metadata: Callable[[gguf.GGUFWriter], Any],
    pre: str | None = "gpt-2",
    context: int = 2048,
    types: dict[str, int] | None = None,
    merges: list[str] = MERGES,
) -> Path:
    """Writes a model. pre: name of the pre-tokenizer, None for a file without one. types: token types by name."""
    writer = gguf.GGUFWriter(path, architecture)
    tokens = vocabulary()
    kinds = dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL) | (types or {})
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_vocab_size(len(tokens))
    writer.add_block_count(LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    metadata(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    finish_gguf(writer)
    return path


def attention_metadata(writer: gguf.GGUFWriter, kv_heads: int | list[int] = KV_HEADS, heads: int = HEADS) -> None:
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(WIDTH // heads)
    writer.add_value_length(WIDTH // heads)
    writer.add_rope_dimension_count(WIDTH // heads)
    writer.add_rope_freq_base(10000.0)


class Random:
    """Random tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def matrix(self, *shape: int, scale: float = 0.3) -> np.ndarray:
        return self.generator.normal(0, scale, shape)

    def embeddings(self, tied: bool = False) -> Tensors:
        tokens = len(vocabulary())
        tensors = {"token_embd.weight": self.matrix(tokens, WIDTH, scale=1.0), "output_norm.weight": np.ones(WIDTH)}
        return tensors if tied else tensors | {"output.weight": self.matrix(tokens, WIDTH)}

    def attention(self, prefix: str, kv_heads: int = KV_HEADS) -> Tensors:
        return {
            f"{prefix}attn_norm.weight": np.ones(WIDTH),
            f"{prefix}attn_q.weight": self.matrix(WIDTH, WIDTH),
            f"{prefix}attn_k.weight": self.matrix(kv_heads * HEAD, WIDTH),
            f"{prefix}attn_v.weight": self.matrix(kv_heads * HEAD, WIDTH),
            f"{prefix}attn_output.weight": self.matrix(WIDTH, WIDTH),
        }

    def feed_forward(self, prefix: str) -> Tensors:
        return {
            f"{prefix}ffn_norm.weight": np.ones(WIDTH),
            f"{prefix}ffn_gate.weight": self.matrix(FEED_FORWARD, WIDTH),
            f"{prefix}ffn_up.weight": self.matrix(FEED_FORWARD, WIDTH),
            f"{prefix}ffn_down.weight": self.matrix(WIDTH, FEED_FORWARD),
        }

    def layers(self, extra: Callable[[str], Tensors] = lambda prefix: {}) -> Tensors:
        tensors: Tensors = {}
        for layer in range(LAYERS):
            prefix = f"blk.{layer}."
            tensors |= self.attention(prefix) | self.feed_forward(prefix) | extra(prefix)
        return tensors


def llama(path: Path, wide: bool = False, more: Callable[[Any], Any] | None = None, **options: Any) -> Path:
    """A Llama. wide: heads of 32 values instead of 16. more: adds metadata."""
    random = Random()

    def metadata(writer: gguf.GGUFWriter) -> None:
        attention_metadata(writer, KV_HEADS // 2 if wide else KV_HEADS, HEADS // 2 if wide else HEADS)
        if more is not None:
            more(writer)

    return write(path, "llama", random.embeddings() | random.layers(), metadata, **options)


WINDOW = 32


def _post_norms(prefix: str) -> Tensors:
    return {f"{prefix}post_attention_norm.weight": np.ones(WIDTH), f"{prefix}post_ffw_norm.weight": np.ones(WIDTH)}


def gemma2(path: Path) -> Path:
    """A sliding window in every second layer; both soft caps."""
    random = Random()

    def metadata(writer: gguf.GGUFWriter) -> None:
        attention_metadata(writer)
        writer.add_sliding_window(WINDOW)
        writer.add_attn_logit_softcapping(3.0)
        writer.add_final_logit_softcapping(30.0)

    return write(path, "gemma2", random.embeddings(tied=True) | random.layers(_post_norms), metadata)


def gemma3(path: Path) -> Path:
    """A sliding window in every layer but each sixth; an output matrix of its own, so that texts vary."""
    random = Random()

    def metadata(writer: gguf.GGUFWriter) -> None:
        attention_metadata(writer)
        writer.add_sliding_window(WINDOW)

    def extra(prefix: str) -> Tensors:
        norms = {f"{prefix}attn_q_norm.weight": np.ones(HEAD), f"{prefix}attn_k_norm.weight": np.ones(HEAD)}
        return norms | _post_norms(prefix)

    return write(path, "gemma3", random.embeddings() | random.layers(extra), metadata)


ORIGINAL = 256  # context up to which a LongRoPE model's short factors hold


def phi3_factors() -> tuple[np.ndarray, np.ndarray]:
    """Short and long rotary factors."""
    return np.linspace(1, 1.5, HEAD // 2), np.linspace(2, 64, HEAD // 2)


def phi3(path: Path, tensors: Tensors | None = None, attention_factor: float = 1.19, original: int = ORIGINAL) -> Path:
    """LongRoPE. tensors: those of the layers and embeddings; random ones if not given."""
    random = Random()
    short, long = phi3_factors()

    def metadata(writer: gguf.GGUFWriter) -> None:
        attention_metadata(writer, HEADS)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention_factor)

    if tensors is None:
        tensors = random.embeddings()
        for layer in range(LAYERS):
            prefix = f"blk.{layer}."
            tensors |= {
                f"{prefix}attn_norm.weight": np.ones(WIDTH),
                f"{prefix}ffn_norm.weight": np.ones(WIDTH),
                f"{prefix}attn_qkv.weight": random.matrix(3 * WIDTH, WIDTH),
                f"{prefix}attn_output.weight": random.matrix(WIDTH, WIDTH),
                f"{prefix}ffn_up.weight": random.matrix(2 * FEED_FORWARD, WIDTH),
                f"{prefix}ffn_down.weight": random.matrix(WIDTH, FEED_FORWARD),
            }
    factors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    return write(path, "phi3", tensors | factors, metadata, context=1024)


STATE, INNER, RANK, CONVOLUTION = 8, 2 * WIDTH, 4, 4


def mamba(path: Path) -> Path:
    """A recurrent model: no keys and values, one state."""
    random = Random()

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(CONVOLUTION)
        writer.add_ssm_inner_size(INNER)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_time_step_rank(RANK)

    tensors = random.embeddings(tied=True)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        tensors |= {
            f"{prefix}attn_norm.weight": np.ones(WIDTH),
            f"{prefix}ssm_in.weight": random.matrix(2 * INNER, WIDTH),
            f"{prefix}ssm_conv1d.weight": random.matrix(INNER, CONVOLUTION),
            f"{prefix}ssm_conv1d.bias": random.matrix(INNER),
            f"{prefix}ssm_x.weight": random.matrix(RANK + 2 * STATE, INNER),
            f"{prefix}ssm_dt.weight": random.matrix(INNER, RANK),
            f"{prefix}ssm_dt.bias": random.matrix(INNER) - 3,
            f"{prefix}ssm_a": -np.tile(np.arange(1, STATE + 1), (INNER, 1)),
            f"{prefix}ssm_d": np.ones(INNER),
            f"{prefix}ssm_out.weight": random.matrix(WIDTH, INNER),
        }
    return write(path, "mamba", tensors, metadata)


def lfm2(path: Path) -> Path:
    """A hybrid: a short convolution with a state in the first layer, attention in the second."""
    random = Random()

    def metadata(writer: gguf.GGUFWriter) -> None:
        attention_metadata(writer, [0, KV_HEADS])
        writer.add_shortconv_l_cache(3)

    tensors = random.embeddings(tied=True)
    del tensors["output_norm.weight"]
    tensors["token_embd_norm.weight"] = np.ones(WIDTH)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        tensors |= random.feed_forward(prefix)
        if layer == 0:
            tensors |= {
                f"{prefix}attn_norm.weight": np.ones(WIDTH),
                f"{prefix}shortconv.conv.weight": random.matrix(WIDTH, 3),
                f"{prefix}shortconv.in_proj.weight": random.matrix(3 * WIDTH, WIDTH),
                f"{prefix}shortconv.out_proj.weight": random.matrix(WIDTH, WIDTH),
            }
        else:
            norms = {f"{prefix}attn_q_norm.weight": np.ones(HEAD), f"{prefix}attn_k_norm.weight": np.ones(HEAD)}
            tensors |= random.attention(prefix) | norms
    return write(path, "lfm2", tensors, metadata)


def gpt2(path: Path) -> Path:
    """A learned embedding per position: 64 positions, and none beyond."""
    random = Random()

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count(HEADS)
        writer.add_layer_norm_eps(1e-5)

    tensors = random.embeddings() | {
        "position_embd.weight": random.matrix(64, WIDTH),
        "output_norm.bias": np.zeros(WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name, rows, columns in (
            ("attn_qkv", 3 * WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_up", FEED_FORWARD, WIDTH),
            ("ffn_down", WIDTH, FEED_FORWARD),
        ):
            tensors |= {f"{prefix}{name}.weight": random.matrix(rows, columns), f"{prefix}{name}.bias": np.zeros(rows)}
        for name in ("attn_norm", "ffn_norm"):
            tensors |= {f"{prefix}{name}.weight": np.ones(WIDTH), f"{prefix}{name}.bias": np.zeros(WIDTH)}
    return write(path, "gpt2", tensors, metadata, context=64)


ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "llama": llama, "gemma2": gemma2, "gemma3": gemma3, "phi3": phi3, "mamba": mamba, "lfm2": lfm2,
}  # fmt: skip
