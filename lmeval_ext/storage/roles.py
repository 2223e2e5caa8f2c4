"""The role of a weight, that is, the part of the model that it belongs to, by its name.

One table of names or patterns per role, as published checkpoints use them; a dot separates the components of a name.
Where the decoder is, and what lies outside it, is found by `decoder`; these tables name the parts inside it. For GGUF,
`GGUF_ROLES` has one row per pattern, in the order in which they are tried.

To add an architecture with new names, add them to the table of their role, and a case to
`tests/storage/test_architectures.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lmeval_ext.storage.tensors import Role

# Names of layers that no engine loads unless it drafts tokens: multi-token prediction, EAGLE, Medusa.
DRAFTS = re.compile(
    r"(^|\.)(mtp(_\w+)?|nextn\w*|next_n_\w+|multi_token_predict\w*|eagle\w*|medusa\w*|hydra\w*|draft\w*|speculator\w*)(\.|$)"
)

# Words (between underscores, dots and capitals) that name a part for another modality than text.
MODALITY_WORDS = frozenset({
    "vision", "visual", "vit", "image", "img", "pixel", "patch", "video", "ocr", "clip", "siglip",
    "dino", "sam", "vqmodel", "vqvae", "vpm", "audio", "speech", "sound", "voice", "acoustic", "whisper", "mel", "wav",
    "token2wav", "code2wav", "codec", "tts", "talker", "apm", "modal", "multimodal", "modality", "mm", "qformer",
    "resampler", "perceiver", "projector", "merger", "aligner", "connector", "abstractor",
})  # fmt: skip

# Components of names. The first of the embeddings that lies beside the layers is the token embedding.
TOKEN_EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "token_embedding",
    "token_embeddings", "tokens_embed", "embed", "tok_emb", "token_emb", "input_embedding", "input_embeddings",
})  # fmt: skip
# These are the token embedding only where no component above is.
POSSIBLE_TOKEN_EMBEDDINGS = frozenset({"embeddings", "embedding", "emb", "shared"})
OTHER_EMBEDDINGS = frozenset({"wpe", "new_embedding", "pos_emb", "ape"})
_EMBEDDING_WORDS = frozenset({"embed", "embeds", "embedding", "embeddings", "emb", "embedder", "wte"})
_PROJECTION_WORDS = frozenset({"proj", "projs", "projection", "projections", "linear", "norm", "layernorm"})

# Output matrices: names that stand for nothing else, and names that do so only beside the layers or above them.
HEADS = frozenset({
    "lm_head", "embed_out", "output_layer", "unembed", "unembedding", "unembeddings", "lm_output",
    "output_embedding", "output_embeddings",
})  # fmt: skip
HEADS_BESIDE_THE_LAYERS = frozenset({
    "output", "head", "ff_out", "proj_out", "decoder", "output_projection", "output_proj", "generator", "logits",
    "vocab_head", "lm_proj",
})  # fmt: skip
# Modules around an output matrix; their other matrices, through which every token passes, count as layers.
HEAD_MODULES = HEADS | {"cls", "predictions", "generator_predictions", "head", "generator"}

# Matrices beside the layers that every token passes through, so they count as layers.
DECODER_PARTS = re.compile(
    r"^(per_layer_model_projection|altup_projections|altup_unembed_projections"  # Gemma 3n and 4
    r"|hc_head\w*"  # DeepSeek-V4's hyper-connections
    r"|project_in|project_out"  # OPT
    r"|gated_cross_attn_layers|cross_attn_layers"  # IDEFICS, BLT
    r"|embedding_hidden_mapping_in|embeddings_project)$"  # ALBERT, ELECTRA
)
# Stacks of text layers beside the decoder, in models of text alone.
TEXT_STACKS = re.compile(r"^((model|transformer)\.)?(decoder\.)?(layers|h|block|blocks)$")
ENCODER_STACKS = re.compile(r"(^|\.)encoder\.(layers|block|layer)$")
# Components under which composite models keep the language model, and nothing else.
LANGUAGE_MODELS = frozenset({"language_model", "text_model", "text_decoder", "llm", "language", "lm"})
LAYER_LISTS = frozenset({"layers", "h", "blocks", "block", "layer"})

ROUTERS = frozenset({
    "gate", "router", "router_gate", "moe_gate", "expert_gate", "shared_expert_gate", "shared_experts_gate",
})  # fmt: skip
# Words of other routers' names: one of the first, or one of the second beside one of the third ("experts_gate").
_ROUTER_WORDS, _GATE_WORDS, _EXPERT_WORDS = {"router", "routers", "gating"}, {"gate"}, {"expert", "experts", "moe"}
_NOT_ROUTERS = {"proj", "up", "norm", "modality"}  # Gemma 3n's modality_router mixes its streams, and is a layer's
_ATTENTION = re.compile(r"attn|attention")
NORM = re.compile(r"norm|^ln_|^ln\d*$|layer_?norm|^q_ln$|^k_ln$")
# Rotations that compressed-tensors applies while the model runs (transform/factory/base.py: SCHEME_LOCATION).
TRANSFORM = re.compile(r"_(weight_input|weight_output|input|output|q_attn|k_cache)$")
# Buffers that some checkpoints store beside the weights; `grouping` counts them as "other".
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|num_batches_tracked|position_ids|token_type_ids|masked_bias|attn\.bias|attention\.bias"
    r"|(cos|sin)_cached?"
    r"|\w+_quantizer\.\w+)$"  # ModelOpt's statistics: weight_quantizer._amax, k_bmm_quantizer._amax
)
# Scales of the KV cache, of attention scores and of activations, one per tensor or per head ([heads, 1, 1]).
CACHE_SCALE = re.compile(
    r"(^|\.)(q|k|v|kv|qk|p|prob|softmax|attn|o|query|key|value)(_cache|_proj\.output|_output)?[_.]"
    r"(scale|scale_inv|zero_point|global_scale|scaling_factor)s?$"
)


def words(components: Iterable[str]) -> set[str]:
    """Return the words of a name's components, in lower case: "mlp_AR" gives "mlp" and "ar"."""
    return {
        word.lower() for component in components for word in re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", component) if word
    }


def of_another_modality(components: Iterable[str]) -> bool:
    """Return whether a name says that the weight serves another modality than text."""
    return any(word in MODALITY_WORDS or word.removesuffix("s") in MODALITY_WORDS for word in words(components))


def is_embedding(name: str) -> bool:
    """Return whether a component names a table of embeddings, of tokens or of anything else."""
    if name in TOKEN_EMBEDDINGS or name in POSSIBLE_TOKEN_EMBEDDINGS or name in OTHER_EMBEDDINGS:
        return True
    parts = words([name])
    return not parts.isdisjoint(_EMBEDDING_WORDS) and parts.isdisjoint(_PROJECTION_WORDS)


def is_routing(module: str) -> bool:
    """Return whether a weight of a layer decides which experts a token goes to; module: its name below the layer."""
    components = module.split(".")
    position = next((index for index, name in enumerate(components) if _names_a_router(name)), None)
    # An attention's gate scales its output and is a layer's weight like any other.
    return position is not None and not any(map(_ATTENTION.search, components[:position]))


def _names_a_router(component: str) -> bool:
    if component in ROUTERS:
        return True
    parts = words([component])
    if not parts.isdisjoint(_NOT_ROUTERS):
        return False
    gate = not parts.isdisjoint(_GATE_WORDS) and not parts.isdisjoint(_EXPERT_WORDS)
    return gate or not parts.isdisjoint(_ROUTER_WORDS)


def layer_role(module: str, matrix: bool) -> Role:
    """Return the role of a weight inside a layer of the decoder.

    module: its name below the layer, without ".weight". matrix: whether it has two or more logical dimensions.
    """
    components = module.split(".")
    last = components[-1]
    adapter = next((index for index, name in enumerate(components) if name.startswith("lora_")), len(components))
    if of_another_modality(components[adapter:]):  # Phi-4-multimodal: lora_A.vision beside each matrix
        return "vision"
    if not matrix or last.endswith("bias") or NORM.search(last):
        return "other"
    if is_routing(module):
        return "router"
    if last in TOKEN_EMBEDDINGS or last in OTHER_EMBEDDINGS or last in ("embeddings", "embedding"):
        return "embedding"
    return "layer"


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
