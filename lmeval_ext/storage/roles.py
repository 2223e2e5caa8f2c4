"""The role of a weight, that is, the part of the model that it belongs to, by its name.

One table of names or patterns per role, as published checkpoints use them; a dot separates the components of a name.
`role_of` tries the tables in a fixed order and the first match decides; a matrix that matches none is a layer. For
GGUF, `GGUF_ROLES` has one row per pattern, in the order in which they are tried.

To add an architecture with new names, add them to the table of their role, and a case to `tests/storage/test_dense.py`.
"""

from __future__ import annotations

import re

from lmeval_ext.storage.tensors import Role

# Components of the names of weights outside the language model: towers, projectors, speech heads.
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
# Buffers that some checkpoints store beside the weights; `grouping` counts them as "other".
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|num_batches_tracked|position_ids|token_type_ids|masked_bias|attn\.bias|attention\.bias)$"
)


def role_of(module: str, matrix: bool, layers: int | None) -> Role:
    """Return the role of a weight in a Hugging Face checkpoint.

    module: its name without ".weight". matrix: whether it has two or more logical dimensions. layers:
    `num_hidden_layers` of the language model; layers after these are draft layers, which is how DeepSeek and GLM store
    MTP.
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
    """Return whether the layer number in a name is at least `layers`."""
    index = LAYER_INDEX.search(module)
    # Encoder-decoder models number their two stacks separately, so the rule does not apply to them.
    return bool(index and layers and int(index[1]) >= layers and ".decoder." not in module and "encoder." not in module)


# One row per pattern of llama.cpp's tensor names (gguf-py/gguf/constants.py, TENSOR_NAMES); the first match decides.
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
    """Return the role of a GGUF tensor.

    matrix: whether it has two or more dimensions. layers: blocks of the language model; later ones are draft blocks.
    """
    block = re.match(r"blk\.([0-9]{1,9})\.", name)
    if block and layers is not None and int(block[1]) >= layers:
        return "draft"
    for pattern, role in GGUF_ROLES:
        if pattern.search(name):
            return role if matrix or role in ("vision", "draft") else "other"
    return "layer" if matrix else "other"
