"""A float32 Llama of Transformers behind the ExLlama adapters' `Engine` and `Generator`, for tests without a GPU."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from lmeval_ext.models.exllama.adapter import ExLlamaLM
from lmeval_ext.models.exllama.generation import GenerationJob
from lmeval_ext.models.record import Quantization
from lmeval_ext.models.shared_contexts import common_prefix

PADDING = 7  # columns of the output matrix that are no tokens


class TinyEngine:
    """Counts forwards and tokens; runs out of memory beyond `memory` tokens a forward."""

    shares = True
    token_limit: int | None = None
    bytes_per_token = 1

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.device = torch.device("cpu")
        self.vocabulary = int(self.model.config.vocab_size)
        self.columns = self.vocabulary + PADDING
        self.memory: int | None = None
        self.shapes: list[tuple[int, int]] = []
        self.branched: list[int] = []

    def enter(self) -> None:
        pass

    def _forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        if self.memory is not None and ids.numel() > self.memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a test)")
        self.shapes.append(tuple(ids.shape))  # type: ignore[arg-type]
        return self.model.model(input_ids=ids, past_key_values=past, use_cache=True)

    def hidden(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        return self._forward(ids).last_hidden_state[:, -keep:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(self.model.lm_head(hidden), (0, PADDING), value=1e4)

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        return len(contexts) <= 3

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        self.branched.append(len(contexts))
        shared = min(common_prefix(contexts[0], c) for c in contexts)
        trunk = self._forward(torch.tensor([list(contexts[0][:shared])])).past_key_values if shared else None
        parts = []
        for context, rows in zip(contexts, tails, strict=True):
            past = copy.deepcopy(trunk)
            if len(context) > shared:
                past = self._forward(torch.tensor([list(context[shared:])]), past).past_key_values
            parts += [
                self._forward(torch.tensor([list(row)]), copy.deepcopy(past)).last_hidden_state[0] for row in rows
            ]
        return torch.cat(parts)


class TinyGenerator:
    """Greedy, one job at a time, results as the engines give them."""

    def __init__(self, engine: TinyEngine, cache_tokens: int = 4096) -> None:
        self.engine, self.cache_tokens = engine, cache_tokens
        self.jobs: list[GenerationJob] = []
        self.prompts: list[GenerationJob] = []

    def submit(self, prompt: GenerationJob) -> None:
        self.jobs.append(prompt)
        self.prompts.append(prompt)

    @torch.inference_mode()
    def step(self) -> list[dict[str, Any]]:
        job = self.jobs.pop(0)
        started: dict[str, Any] = {"stage": "started", "identifier": job.index, "eos": False}
        results = [started]
        ids = list(job.ids)
        for n in range(job.max_new):
            hidden = self.engine.model.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
            new = int(self.engine.model.lm_head(hidden).argmax())
            ids.append(new)
            stopped = new in job.stop_tokens
            token = torch.tensor([[new]])
            result = {"stage": "streaming", "identifier": job.index, "eos": stopped or n == job.max_new - 1}
            # The engines hold a stopping token back
            results.append(result | ({"held": {"token_ids": token}} if stopped else {"token_ids": token}))
            if stopped:
                break
        return results

    def clear(self) -> None:
        self.jobs = []


class TinyExLlama(ExLlamaLM):
    """The adapters' shared class on the tiny engine."""

    engine_name, engine_version, dtype = "tiny", "1", torch.float32
    engine: TinyEngine

    def load(self, memory: int | None = None, share: bool = True, cache_tokens: int = 4096, **_: Any) -> TinyEngine:
        engine = TinyEngine(self.folder)
        engine.memory, engine.shares = memory, share
        self.generators = [TinyGenerator(engine, cache_tokens)]
        return engine

    def generator(self) -> TinyGenerator:
        return self.generators[0]

    def facts(self, facts: Quantization) -> Quantization:
        facts.kernel = "tiny"
        return facts


class _PagedLayer:
    def __init__(self, pages: int, page: int, heads: int, dim: int) -> None:
        # Not zeros: what is read before it was written shows
        self.k, self.v = (torch.full((pages, page, heads, dim), 1e3) for _ in range(2))

    def get_tensors(self) -> list[torch.Tensor]:
        return [self.k, self.v]


class PagedTinyEngine(TinyEngine):
    """Keys and values in pages, read and written through block tables as ExLlamaV3 does; `branch` by its `Branches`."""

    def __init__(self, folder: Path, pages: int = 64, page: int = 16) -> None:
        from lmeval_ext.models.exllama.v3.branches import Branches

        super().__init__(folder)
        config, self.page = self.model.config, page
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        layers = {(i, 0): _PagedLayer(pages, page, heads, dim) for i in range(config.num_hidden_layers)}
        self.cache = types.SimpleNamespace(layers=layers, max_num_tokens=pages * page)
        self.branches = Branches(self, page)
        self.tokens = 0

    def prefill(self, ids: torch.Tensor, params: dict[str, Any]) -> None:
        self.body(ids, params)

    @torch.inference_mode()
    def body(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        self.tokens += ids.numel()
        states = []
        for row, table, past in zip(ids, params["block_table"], params["cache_seqlens"].tolist(), strict=True):
            held = DynamicCache()
            for (index, _), layer in self.cache.layers.items():
                k, v = (t[table.long()].flatten(0, 1)[:past].transpose(0, 1)[None] for t in layer.get_tensors())
                held.update(k, v, index)
            out = self.model.model(input_ids=row[None], past_key_values=held, use_cache=True)
            for (index, _), layer in self.cache.layers.items():
                for tensor, new in zip(
                    layer.get_tensors(), (held.layers[index].keys, held.layers[index].values), strict=True
                ):
                    for position in range(past, past + len(row)):
                        page = int(table[position // self.page])
                        tensor[page, position % self.page] = new[0, :, position]
            states.append(out.last_hidden_state[0])
        return torch.stack(states)

    def fits(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> bool:
        return self.branches.fit(contexts, tails)

    def branch(self, contexts: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        self.branched.append(len(contexts))
        return self.branches.run(contexts, tails)
