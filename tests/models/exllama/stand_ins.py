"""Stand-ins for the packages exllamav2 and exllamav3 on a float32 Llama, with the names that the adapters use."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmeval_ext.models.exllama.loading
from tests.models.exllama.tiny_engine import (
    PADDING,
    PagedCache,
    RowCache,
    forward_in_pages,
    forward_in_rows,
    greedy_results,
)

ORIGINAL_ATTENTION = "the engine's own"
PAGE = 256
_ENGINE_MODULES = ("adapter", "attention", "engine", "generation")  # the modules that import the engine


@contextlib.contextmanager
def adapter_module(version: str, name: str) -> Iterator[Any]:
    """Yields a newly imported module of `exllama/v2` or `v3`; restores all engine modules afterwards."""
    package = f"lmeval_ext.models.exllama.{version}"
    modules = [f"{package}.{each}" for each in _ENGINE_MODULES]
    kept = {each: sys.modules.pop(each) for each in modules if each in sys.modules}
    try:
        yield importlib.import_module(f"{package}.{name}")
    finally:
        for each in modules:
            sys.modules.pop(each, None)
        sys.modules.update(kept)


def _install(monkeypatch: pytest.MonkeyPatch, package: str, modules: dict[str, dict[str, Any]]) -> None:
    for name, content in modules.items():
        module = types.ModuleType(f"{package}{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(lmeval_ext.models.exllama.loading, "require", lambda package: None)
    gpu = types.SimpleNamespace(total_memory=1 << 36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


def _causal_lower_right(rows: int, columns: int) -> Any:
    """PyTorch's, whose module also imports the compiler."""
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(rows, columns)


class Module:
    """A module of either engine: a function and its attributes, such as the device."""

    def __init__(self, forward: Any, **attributes: Any) -> None:
        self.forward, self.caps, self.quant_type = forward, {}, "fp16"
        self.device_idx = None
        vars(self).update(attributes)


def _head(model: Any) -> Any:
    """Returns a function that multiplies by the output matrix and adds columns that are not tokens."""
    return lambda hidden, *_, **__: torch.nn.functional.pad(model.lm_head(hidden), (0, PADDING), value=1e4)


class DynamicGenerator:
    """Stands for both engines' dynamic generators: greedy, one job after the other.

    It overwrites the cache but does not read it.
    """

    def __init__(self, model: Any, cache: Any, tokenizer: Any, **arguments: Any) -> None:
        self.model, self.cache, self.arguments = model, cache, arguments
        self.pending_jobs: list[Any] = []
        self.active_jobs: list[Any] = []

    def enqueue(self, job: Any) -> None:
        self.pending_jobs.append(job)

    def iterate(self) -> list[dict[str, Any]]:
        job = self.pending_jobs.pop(0)
        for tensor in self.cache.all_tensors():
            tensor.fill_(1e3)
        return greedy_results(
            self.model.llama, job.input_ids[0].tolist(), job.max_new_tokens, job.stop_conditions, job.identifier
        )

    def cancel(self, job: Any) -> None:
        self.pending_jobs.remove(job)

    def clear_queue(self) -> None:
        self.pending_jobs = []

    def close(self) -> None:
        self.model = None


# ---------------------------------------------------------------------- ExLlamaV2


class Attention:
    """Stands for exllamav2.attn.ExLlamaV2Attention: the attributes that attention reads."""

    layer_idx = 0
    Params = staticmethod(lambda *arguments: arguments)

    def __init__(self, groups: int = 2, window: int = 0) -> None:
        self.num_key_value_groups, self.sliding_window, self.scaling = groups, window, 0.3

    def repeat_kv(self, states: torch.Tensor, n: int) -> torch.Tensor:
        return states.repeat_interleave(n, dim=1)

    def _attn_torch(self, *arguments: Any) -> str:
        return ORIGINAL_ATTENTION


class V2Config:
    """Stands for exllamav2.ExLlamaV2Config."""

    no_flash_attn = no_xformers = no_sdpa = False
    attn_logit_softcapping = final_logit_softcapping = alt_rope_method = None
    rotary_embedding_base, scale_pos_emb, partial_rotary_factor = 10000.0, 1.0, 1.0
    model_dir: str

    def prepare(self) -> None:
        config = json.loads((Path(self.model_dir) / "config.json").read_text())
        self.vocab_size, self.max_seq_len = config["vocab_size"], config["max_position_embeddings"]
        if config["architectures"] != ["LlamaForCausalLM"]:
            print(" !! Warning, unknown architecture:", config["architectures"])

    def arch_compat_overrides(self, quiet: bool = False) -> None:
        pass


class V2Model:
    """Stands for exllamav2.ExLlamaV2. Its layers are one module."""

    def __init__(self, config: V2Config) -> None:
        self.config, self.head_layer_idx, self.last_kv_layer_idx = config, 2, 1
        self.splits: list[Any] = []

    def load(self, split: Any = None) -> None:
        from transformers import AutoModelForCausalLM

        self.splits.append(split)
        self.llama = llama = AutoModelForCausalLM.from_pretrained(self.config.model_dir, dtype=torch.float32)
        embedding = Module(None, embedding=llama.model.embed_tokens, device=lambda: "cpu")
        embedding.forward = lambda ids, **_: embedding.embedding(ids)

        def layers(states: torch.Tensor, cache: Any, past_len: int, **_: Any) -> torch.Tensor:
            if cache is None:
                return llama.model(inputs_embeds=states, use_cache=False).last_hidden_state
            return forward_in_rows(llama, states, cache, past_len)

        head = Module(_head(llama), device=lambda: "cpu", out_features=self.config.vocab_size + PADDING)
        self.modules = [embedding, Module(layers, device=lambda: "cpu"), head]

    def load_autosplit(self, cache: Any) -> None:
        self.load("auto")
        cache.allocate()

    def is_quant(self) -> bool:
        return False

    def get_device_context(self, index: Any) -> Any:
        return types.SimpleNamespace(stream=None)


class V2Cache(RowCache):
    """Stands for exllamav2.ExLlamaV2Cache."""

    def __init__(self, model: V2Model, batch_size: int, max_seq_len: int, lazy: bool = False) -> None:
        self._make = lambda: RowCache.__init__(self, model.llama.config, batch_size, max_seq_len)
        self.max_seq_len, self.layers = max_seq_len, []
        if not lazy:
            self.allocate()

    def allocate(self) -> None:
        self._make()


def install_exllamav2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a stand-in for ExLlamaV2 0.3.2 without flash-attn in place of the package."""
    attention = {
        "ExLlamaV2Attention": type("ExLlamaV2Attention", (Attention,), {}),
        "has_flash_attn": False,
        "has_flash_attn_with_paged": False,
        "has_xformers": False,
        "causal_lower_right": _causal_lower_right,
    }
    sampler = type("ExLlamaV2Sampler", (), {"Settings": types.SimpleNamespace})
    modules: dict[str, dict[str, Any]] = {
        "": {
            "__version__": "0.3.2",
            "ExLlamaV2": V2Model,
            "ExLlamaV2Config": V2Config,
            "ExLlamaV2Tokenizer": lambda config: None,
            "ExLlamaV2Cache": V2Cache,
            **{f"ExLlamaV2Cache_Q{bits}": V2Cache for bits in (4, 6, 8)},
        },
        ".attn": attention,
        ".compat": {"safe_move_tensor": lambda x, index, non_blocking: x},
        ".device": {"set_device_streams": lambda: None},
        ".ext": {"exllamav2_ext": None},
        ".generator": {
            "ExLlamaV2DynamicGenerator": DynamicGenerator,
            "ExLlamaV2DynamicJob": types.SimpleNamespace,
            "ExLlamaV2Sampler": sampler,
        },
    }
    _install(monkeypatch, "exllamav2", modules)
    sys.modules["exllamav2"].attn = sys.modules["exllamav2.attn"]  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


# ---------------------------------------------------------------------- ExLlamaV3


class V3Config:
    """Stands for exllamav3.Config."""

    def __init__(self, folder: str) -> None:
        self.folder, self.stc = folder, "the checkpoint's own tensors"
        self.vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    from_directory = classmethod(lambda cls, folder: cls(folder))


class VariantTensors:
    """Stands for exllamav3.loader.VariantSafetensorsCollection."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.overrides: list[tuple[list[str], str]] = []  # keys, folder

    def add_stc(self, keys: list[str], folder: str) -> None:
        self.overrides.append((keys, folder))


class V3Model:
    """Stands for exllamav3.Model. Its layers are one module."""

    loaded_tp = False
    output_device = "cpu"

    def __init__(self, config: V3Config) -> None:
        from transformers import AutoModelForCausalLM

        self.config, self.caps = config, {}
        self.llama = llama = AutoModelForCausalLM.from_pretrained(config.folder, dtype=torch.float32)
        embedding = Module(None, embedding=llama.model.embed_tokens, device=torch.device("cpu"))
        embedding.forward = lambda ids, params: embedding.embedding(ids)

        def layers(states: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
            if params["attn_mode"] == "flash_attn_nc":
                return llama.model(inputs_embeds=states, use_cache=False).last_hidden_state
            return forward_in_pages(llama, states, params, PAGE)

        head = Module(_head(llama), prepare_for_device=lambda x, params: x, caps={"logits_output": True})
        head.out_features = config.vocab_size + PADDING
        self.modules = [embedding, Module(layers, device=torch.device("cpu")), head]
        self.fwd_modules = [(module, 0, index) for index, module in enumerate(self.modules)]

    from_config = classmethod(lambda cls, config: cls(config))

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def load(self, **arguments: Any) -> None:
        self.load_arguments = arguments

    def get_recurrent_layers(self) -> list[Any]:
        return []

    def forward(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        for module, _, _ in self.fwd_modules:
            ids = module.forward(ids, params)
        return ids

    prefill = forward


class V3Cache(PagedCache):
    """Stands for exllamav3.Cache. layer_type: the class of its layers."""

    def __init__(self, model: V3Model, max_num_tokens: int, layer_type: type, **bits: int) -> None:
        super().__init__(model.llama.config, max_num_tokens // PAGE, PAGE)
        for layer in self.layers.values():
            layer.__class__ = type(layer_type.__name__, (type(layer),), {}) if bits else layer_type

    def all_tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers.values() for tensor in layer.get_tensors()]


def install_exllamav3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a stand-in for ExLlamaV3 in place of the package."""
    from tests.models.exllama.tiny_engine import PagedLayer

    names = types.SimpleNamespace
    modules: dict[str, dict[str, Any]] = {
        "": {
            "__version__": "1.6.5",
            "Cache": V3Cache,
            "CacheLayer_fp16": PagedLayer,
            "CacheLayer_quant": type("CacheLayer_quant", (), {}),
            "Config": V3Config,
            "Generator": DynamicGenerator,
            "Job": names,
            "Model": V3Model,
            "Tokenizer": names(from_config=lambda config: None),
        },
        ".loader": {"SafetensorsCollection": str, "VariantSafetensorsCollection": VariantTensors},
        ".generator": {},
        ".generator.sampler": {"ArgmaxSampler": names, "ComboSampler": names},
    }
    _install(monkeypatch, "exllamav3", modules)
