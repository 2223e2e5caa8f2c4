"""Which part of a model a weight belongs to, by its name.

Tables of names as the published checkpoints use them; the first table that matches decides.
"""

from __future__ import annotations

import re

from lmeval_ext.storage.tensors import Role

# Components of a name that put the weight outside the language model (towers, projectors, speech heads).
OTHER_MODALITIES = frozenset({
    "visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vision_embedder",
    "vision_projection", "vision_adapter", "vision_language_adapter", "patch_merger", "embed_vision", "embed_audio",
    "multi_modal_projector", "multimodal_projector", "mm_projector", "image_newline", "image_embed", "audio_embed",
    "audio_tower", "audio_model", "audio_encoder", "audio_projector", "img_processor", "img_projection",
    "speech_encoder", "vpm", "apm", "resampler", "tts", "talker", "token2wav", "code2wav", "aligner", "connector",
    "mlp1",
})  # fmt: skip
DRAFTS = re.compile(r"(^|\.)(mtp|mtp_layers|mtp_block|nextn|eagle\w*|medusa\w*|draft\w*|speculator)(\.|$)")
LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.([0-9]{1,9})(?:\.|$)")
ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate|(router|gate)\.(layer|classifier|gate|linear|proj|wg))$")
NORM = re.compile(r"norm|^ln_|^ln\d*$|layer_?norm|^q_ln$|^k_ln$")
TOKEN_EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "token_embedding",
})  # fmt: skip
EMBEDDINGS = frozenset({
    "wpe", "embed_positions", "position_embeddings", "token_type_embeddings", "embed_tokens_per_layer", "embeddings",
    "embedding", "pos_emb", "position_embedding", "emb", "shared",
})  # fmt: skip
HEADS = re.compile(
    r"^(.*\.)?(lm_head(\.linear)?|embed_out|output_layer)$|^(output|head|transformer\.ff_out|model\.output)$"
)
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|num_batches_tracked|position_ids|token_type_ids|masked_bias|attn\.bias|attention\.bias)$"
)


def role_of(module: str, matrix: bool, layers: int | None) -> Role:
    """The role of a weight in a Hugging Face checkpoint.

    module: its name without ".weight"; matrix: two or more logical dimensions; layers: `num_hidden_layers` of the
    language model, beyond which a layer is a draft layer (DeepSeek's and GLM's way of storing MTP).
    """
    parts = module.split(".")
    if not OTHER_MODALITIES.isdisjoint(parts):
        return "vision"
    if DRAFTS.search(module) or _beyond(module, layers):
        return "draft"
    if not matrix or parts[-1].endswith("bias") or NORM.search(parts[-1]):
        return "other"
    if ROUTERS.search(module):
        return "router"
    if HEADS.search(module):
        return "head"
    if parts[-1] in TOKEN_EMBEDDINGS:
        return "token_embedding"
    if parts[-1] in EMBEDDINGS:
        return "embedding"
    return "layer"


def _beyond(module: str, layers: int | None) -> bool:
    index = LAYER_INDEX.search(module)
    # Encoder-decoder models count their two stacks apart, so the rule says nothing about them.
    return bool(index and layers and int(index[1]) >= layers and ".decoder." not in module and "encoder." not in module)


# llama.cpp's tensor names: gguf-py/gguf/constants.py, TENSOR_NAMES.
GGUF_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"^(v|a|mm|resampler|adapter)\."), "vision"),
    (re.compile(r"\.nextn\.|^nextn\."), "draft"),
    (re.compile(r"bias$|norm|rope_freqs|rope_factors"), "other"),
    (re.compile(r"\.ffn_gate_inp"), "router"),
    (re.compile(r"^output\.weight$"), "head"),
    (re.compile(r"^token_embd\.weight$"), "token_embedding"),
    (re.compile(r"^(token_types|position_embd|per_layer_token_embd)\."), "embedding"),
)


def gguf_role_of(name: str, matrix: bool, layers: int | None) -> Role:
    """The role of a GGUF tensor; layers: blocks of the language model, draft blocks come after them."""
    block = re.match(r"blk\.([0-9]{1,9})\.", name)
    if block and layers is not None and int(block[1]) >= layers:
        return "draft"
    for pattern, role in GGUF_ROLES:
        if pattern.search(name):
            return role if matrix or role in ("vision", "draft") else "other"
    return "layer" if matrix else "other"
