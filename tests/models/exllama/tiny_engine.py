"""Stand-ins for the ExLlama engines on a float32 Llama of Transformers, for tests without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lmeval_ext.models.exllama.adapter import ExLlamaLM
from lmeval_ext.models.exllama.engine import Tokens
from lmeval_ext.models.exllama.generation import GenerationJob
from lmeval_ext.models.exllama.v2.branches import RowBranches
from lmeval_ext.models.exllama.v3.branches import PageBranches
from lmeval_ext.models.record import Quantization
from lmeval_ext.models.shared_contexts import common_prefix

PADDING = 7  # columns of the output matrix that are not tokens


class TinyEngine:
    """An `Engine` that records the shape of each forward and runs out of memory beyond `memory` tokens per forward."""

    shares = True
    token_limit: int | None = None
    bytes_per_token = 1

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

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

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        return len(contexts) <= 3

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
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


@torch.inference_mode()
def greedy_results(
    model: Any, prompt: Sequence[int], max_new: int, stop_tokens: Sequence[Any], identifier: int
) -> list[dict[str, Any]]:
    """Returns the results of one complete generation, as both engines' dynamic generators do."""
    results: list[dict[str, Any]] = [{"stage": "started", "identifier": identifier, "eos": False}]
    ids = list(prompt)
    for n in range(max_new):
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
        new = int(model.lm_head(hidden).argmax())
        ids.append(new)
        stopped = new in stop_tokens
        token = torch.tensor([[new]])
        result = {"stage": "streaming", "identifier": identifier, "eos": stopped or n == max_new - 1}
        # The engines return a stopping token separately
        results.append(result | ({"held": {"token_ids": token}} if stopped else {"token_ids": token}))
        if stopped:
            break
    return results


class TinyGenerator:
    """A `JobGenerator`: greedy, one job at a time, with results as the engines return them."""

    def __init__(self, engine: TinyEngine, cache_tokens: int = 4096) -> None:
        self.engine, self.cache_tokens = engine, cache_tokens
        self.jobs: list[GenerationJob] = []  # those not started
        self.submitted: list[GenerationJob] = []

    def submit(self, job: GenerationJob) -> None:
        self.jobs.append(job)
        self.submitted.append(job)

    def step(self) -> list[dict[str, Any]]:
        job = self.jobs.pop(0)
        return greedy_results(self.engine.model, job.ids, job.max_new, job.stop_tokens, job.index)

    def clear(self) -> None:
        self.jobs = []


class TinyExLlama(ExLlamaLM):
    """`ExLlamaLM` on the tiny engine.

    memory: the most tokens of one forward. share: whether choices share their context.
    """

    engine_name, engine_version, dtype = "tiny", "1", torch.float32
    engine: TinyEngine

    def load(self, memory: int | None = None, share: bool = True, cache_tokens: int = 4096, **_: Any) -> TinyEngine:
        engine = TinyEngine(self.folder)
        engine.memory, engine.shares = memory, share
        self.tiny_generator = TinyGenerator(engine, cache_tokens)
        return engine

    def generator(self) -> TinyGenerator:
        return self.tiny_generator

    def describe_engine(self, facts: Quantization) -> Quantization:
        facts.kernel = "tiny"
        return facts


@torch.inference_mode()
def forward_in_pages(model: Any, states: torch.Tensor, params: dict[str, Any], page: int) -> torch.Tensor:
    """Runs the model's layers on embedded tokens, with ExLlamaV3's parameters of a paged cache."""
    from transformers import DynamicCache

    layers = params["cache"].layers
    outputs = []
    for row, table, past in zip(states, params["block_table"], params["cache_seqlens"].tolist(), strict=True):
        held = DynamicCache()
        for (index, _), layer in layers.items():
            k, v = (t[table.long()].flatten(0, 1)[:past].transpose(0, 1)[None] for t in layer.get_tensors())
            held.update(k, v, index)
        out = model.model(inputs_embeds=row[None], past_key_values=held, use_cache=True)
        for (index, _), layer in layers.items():
            for tensor, new in zip(
                layer.get_tensors(), (held.layers[index].keys, held.layers[index].values), strict=True
            ):
                for position in range(past, past + len(row)):
                    tensor[int(table[position // page]), position % page] = new[0, :, position]
        outputs.append(out.last_hidden_state[0])
    return torch.stack(outputs)


class PagedLayer:
    """Stands for exllamav3.CacheLayer_fp16: keys and values of one layer."""

    def __init__(self, pages: int, page: int, heads: int, dim: int) -> None:
        # Large values, so that reading a position that was not written changes the result
        self.k, self.v = (torch.full((pages, page, heads, dim), 1e3) for _ in range(2))

    def get_tensors(self) -> list[torch.Tensor]:
        return [self.k, self.v]

    def storage_size(self) -> int:
        return self.k.nbytes + self.v.nbytes


class PagedCache:
    """Stands for exllamav3.Cache."""

    def __init__(self, config: Any, pages: int, page: int) -> None:
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.layers = {(i, 0): PagedLayer(pages, page, heads, dim) for i in range(config.num_hidden_layers)}
        self.max_num_tokens = pages * page


class BranchingTinyEngine(TinyEngine):
    """Shares contexts through the branches of one ExLlama version, which a subclass sets."""

    branches: PageBranches | RowBranches

    def fits(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> bool:
        return self.branches.fits(contexts, tails)

    def branch(self, contexts: Sequence[Tokens], tails: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        self.branched.append(len(contexts))
        return self.branches.branch(contexts, tails)


class PagedTinyEngine(BranchingTinyEngine):
    """Keeps keys and values in pages, read and written through block tables as in ExLlamaV3; `branch` is V3's."""

    def __init__(self, folder: Path, pages: int = 64, page: int = 16) -> None:
        super().__init__(folder)
        self.page = page
        self.cache = PagedCache(self.model.config, pages, page)
        self.branches = PageBranches(self, page)
        self.tokens = 0

    def prefill(self, ids: torch.Tensor, params: dict[str, Any]) -> None:
        self.body(ids, params)

    def body(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        self.tokens += ids.numel()
        return forward_in_pages(self.model, self.model.model.embed_tokens(ids), params, self.page)


class RowCache:
    """Stands for exllamav2.ExLlamaV2Cache: keys and values of several rows, one tensor per layer and kind."""

    def __init__(self, config: Any, batch_size: int, max_seq_len: int) -> None:
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.batch_size, self.max_seq_len, self.current_seq_len = batch_size, max_seq_len, 0
        # Large values, so that reading a position that was not written changes the result
        self.layers = [
            tuple(torch.full((batch_size, max_seq_len, heads, dim), 1e3) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]

    def all_tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in layer]

    def copy_states(
        self,
        target: RowCache,
        from_column: int,
        from_columns: int,
        to_column: int,
        to_columns: int,
        from_row: int,
        from_rows: int,
        to_row: int,
        to_rows: int,
    ) -> None:
        """Copies columns of one row of this cache to the rows of another, as in ExLlamaV2 0.3.2."""
        assert (from_rows, from_columns) == (1, to_columns)
        for source, copy_ in zip(self.all_tensors(), target.all_tensors(), strict=True):
            copy_[to_row : to_row + to_rows, to_column : to_column + to_columns] = source[
                from_row : from_row + 1, from_column : from_column + from_columns
            ]


@torch.inference_mode()
def forward_in_rows(model: Any, states: torch.Tensor, cache: RowCache, past: int) -> torch.Tensor:
    """Runs the model's layers on embedded tokens, which follow `past` tokens in the rows of the cache."""
    from transformers import DynamicCache

    assert cache.current_seq_len == past
    rows, length = states.shape[:2]
    held = DynamicCache()
    for index, layer in enumerate(cache.layers):
        k, v = (t[:rows, :past].transpose(1, 2) for t in layer)
        held.update(k, v, index)
    out = model.model(inputs_embeds=states, past_key_values=held, use_cache=True)
    for index, layer in enumerate(cache.layers):
        for tensor, new in zip(layer, (held.layers[index].keys, held.layers[index].values), strict=True):
            tensor[:rows, past : past + length] = new.transpose(1, 2)[:, past:]
    return out.last_hidden_state


class RowTinyEngine(BranchingTinyEngine):
    """Keeps keys and values in rows, as ExLlamaV2 does; `branch` is V2's.

    prefilled: (tokens, past) of each forward that fills the trunk. caches: (rows, tokens per row) of each new cache.
    """

    def __init__(self, folder: Path, token_limit: int = 16384, max_length: int = 16384) -> None:
        super().__init__(folder)
        self.prefilled: list[tuple[list[int], int]] = []
        self.caches: list[tuple[int, int]] = []
        self.branches = RowBranches(self, self._new_cache, token_limit, max_length)

    def _new_cache(self, rows: int, length: int) -> RowCache:
        self.caches.append((rows, length))
        return RowCache(self.model.config, rows, length)

    def prefill(self, ids: torch.Tensor, cache: RowCache, past: int) -> None:
        self.prefilled.append((ids[0].tolist(), past))
        self.body(ids, cache, past)

    def body(self, ids: torch.Tensor, cache: RowCache, past: int) -> torch.Tensor:
        return forward_in_rows(self.model, self.model.model.embed_tokens(ids), cache, past)
