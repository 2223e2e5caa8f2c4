"""Tiny random checkpoints of many architectures, and the log-probabilities of a plain Transformers forward.

The forward is one of the model in memory before it was saved, in float32, with eager attention, one window at a time:
nothing of the project takes part in it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.conftest import VOCABULARY, make_tokenizer

LENGTH = 80  # tokens of a window; beyond every sliding window and original context below
CONTEXT = 256
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_MLA = {  # sizes that vLLM's latent attention takes on a CPU
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


@dataclass(frozen=True)
class Architecture:
    """How to make a checkpoint. config: class and fields. model: class, by default that of the config's causal model.

    multimodal: whether the adapters need to be told that it also sees pictures.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    plain: bool = False  # the fields are all there are, without those that most architectures share

    @property
    def multimodal(self) -> bool:
        return self.model is not None


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig"),
    "llama3": Architecture(
        "LlamaConfig",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-yarn": Architecture("LlamaConfig", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama-dynamic": Architecture("LlamaConfig", {"max_position_embeddings": 48, **_rope("dynamic", factor=4.0)}),
    "qwen3": Architecture("Qwen3Config", {"head_dim": 64}),
    "qwen3-moe": Architecture("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 4, "norm_topk_prob": True, **_EXPERTS}),
    "qwen3-next": Architecture(
        "Qwen3NextConfig",
        {"head_dim": 32, "num_experts": 4, "shared_expert_intermediate_size": 64, **_EXPERTS, **_LINEAR},
    ),
    "qwen3.5": Architecture("Qwen3_5TextConfig", {"head_dim": 32, **_LINEAR}),
    "mixtral": Architecture(
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    ),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 3.0,
            **_TWO_KINDS,
        },
    ),
    "gemma3": Architecture("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, **_TWO_KINDS}),
    "gemma3-wrapper": Architecture(
        "Gemma3Config",
        {
            "text_config": {**_TEXT, "head_dim": 32, "query_pre_attn_scalar": 32, **_TWO_KINDS},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
        },
        "Gemma3ForConditionalGeneration",
        plain=True,
    ),
    "phi3-longrope": Architecture(
        "Phi3Config",
        {
            "original_max_position_embeddings": 48,
            "sliding_window": None,
            **_rope(
                "longrope",
                short_factor=[1.0 + 0.05 * i for i in range(16)],
                long_factor=[1.0 + 0.3 * i for i in range(16)],
                original_max_position_embeddings=48,
            ),
        },
    ),
    "granite": Architecture(
        "GraniteConfig",
        {"logits_scaling": 0.4, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    ),
    "cohere": Architecture("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": Architecture("Cohere2Config", {"logit_scale": 0.5, "head_dim": 32, **_TWO_KINDS}),
    "olmo2": Architecture("Olmo2Config"),
    "starcoder2": Architecture("Starcoder2Config", {"sliding_window": 24, "use_bias": True}),
    "gpt-oss": Architecture(
        "GptOssConfig",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **_TWO_KINDS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3Config",
        {
            **_MLA,
            **_EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.0,
            # As published; vLLM has no place for the router's bias without the one, and takes softmax without the other
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        },
    ),
    "falcon-h1": Architecture(
        "FalconH1Config",
        {
            "head_dim": 32,
            "mamba_d_ssm": 128,
            "mamba_chunk_size": 32,
            "lm_head_multiplier": 0.6,
            "embedding_multiplier": 3.0,
            **_MAMBA2,
            "mamba_d_head": 16,
        },
    ),
    "jamba": Architecture(
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "gpt2": Architecture(
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        plain=True,
    ),
    # llama.cpp leaves every fourth layer without rotary positions, whatever the file says
    "smollm3": Architecture("SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen2.5-vl": Architecture(
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_TEXT, **_rope("default", mrope_section=[4, 6, 6])},
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "out_hidden_size": 128,
                "num_heads": 2,
                "patch_size": 14,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": VOCABULARY - 1,
            "video_token_id": VOCABULARY - 2,
            "vision_start_token_id": VOCABULARY - 3,
            "vision_end_token_id": VOCABULARY - 4,
        },
        "Qwen2_5_VLForConditionalGeneration",
        plain=True,
    ),
    # What a head multiplies, caps or projects
    "opt-projected": Architecture(
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": False,
            "init_std": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        plain=True,
    ),
    "phi": Architecture("PhiConfig"),  # its output matrix has a bias
    "padded-vocabulary": Architecture("LlamaConfig", {"vocab_size": VOCABULARY + 128}),
}


def make_model(architecture: Architecture) -> Any:
    """The model in memory, float32: every bias, norm and sink is random too, and logits differ by a few nats."""
    import torch
    import transformers

    fields = architecture.fields if architecture.plain else _TEXT | architecture.fields
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**fields)
    if architecture.model:
        model = getattr(transformers, architecture.model)(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    model.set_attn_implementation("eager")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(("bias", "weight", "sinks")) and "dt_" not in name:
                parameter += 0.15 * torch.randn(parameter.shape, generator=random)
        head = model.get_output_embeddings()
        head.weight *= 2.5 / (head.weight.std() * math.sqrt(head.weight.shape[1]))
        if getattr(head, "bias", None) is not None:
            head.bias.copy_(torch.randn(head.bias.shape, generator=random))
    return model


def windows(count: int = 2, length: int = LENGTH) -> list[list[int]]:
    """Ids of random windows, without the special tokens of wrappers."""
    return np.random.default_rng(length).integers(2, VOCABULARY - 8, (count, length)).tolist()


def logprobs(model: Any, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Log-probabilities of ids[1:], from one forward over the window without its last token."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)[:-1]]), use_cache=False).logits[0].double()
    table = torch.log_softmax(logits, dim=-1)
    return table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def make_checkpoint(name: str, folder: Path, dtype: str = "float32") -> Callable[[Sequence[int]], Any]:
    """Writes a checkpoint with its tokenizer; returns the plain forward, computed with the weights as written."""
    import torch

    model = make_model(ARCHITECTURES[name])
    stored = copy.deepcopy(model).to(getattr(torch, dtype))  # its buffers are rounded too, those of `model` are not
    stored.save_pretrained(folder)
    make_tokenizer(folder)
    for parameter, written in zip(model.parameters(), stored.parameters(), strict=True):
        parameter.data = written.data.float()
    return functools.partial(logprobs, model)
