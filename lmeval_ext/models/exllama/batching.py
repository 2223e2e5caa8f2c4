"""What a scoring engine must offer, how much it is given at a time, and what happens when memory runs out."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lmeval_ext.errors import UserError
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.exllama.memory import free_bytes, is_out_of_memory, release_memory

logger = logging.getLogger(__name__)

# Tokens a forward, where memory allows: far beyond what fills a GPU, so that launching kernels costs nothing.
TOKENS = 32768
_LOGIT_BYTES = 2 << 30  # logits that stand in memory at once
_LEAST_LOGIT_BYTES = 16 << 20


class Batching:
    """How many rows a forward takes: as asked, or from free memory; halved when memory runs out, for good.

    batch_size: rows, or "auto". max_batch_size: the most rows that "auto" takes.
    """

    def __init__(self, engine: Engine, batch_size: int | str = "auto", max_batch_size: int | None = None) -> None:
        self.engine = engine
        self.asked = None if str(batch_size).startswith("auto") else int(batch_size)
        self.most = int(max_batch_size or 64)
        free = free_bytes(engine.device)
        self.tokens = TOKENS
        self.logit_bytes = _LOGIT_BYTES if free is not None else 64 << 20
        if free is not None:
            self.tokens = max(1, min(TOKENS, free // 2 // max(1, engine.bytes_per_token)))
            self.logit_bytes = max(64 << 20, min(_LOGIT_BYTES, free // 4))
        if engine.token_limit is not None:
            self.tokens = min(self.tokens, engine.token_limit)

    def rows(self, length: int) -> int:
        """Rows of `length` tokens for one forward."""
        if self.asked is None:
            return max(1, min(self.most, self.tokens // length))
        limit = self.engine.token_limit
        return max(1, self.asked if limit is None else min(self.asked, limit // length))

    def logit_rows(self) -> int:
        """Positions whose logits are computed at once."""
        return max(1, self.logit_bytes // (2 * self.engine.columns))

    def shrink(self, rows: int, length: int) -> None:
        """`rows` rows of `length` tokens were too many; for one row, its logits were.

        Raises UserError if one row does not fit with few logits at a time.
        """
        if rows <= 1 and self.logit_bytes > _LEAST_LOGIT_BYTES:
            self.logit_bytes = max(_LEAST_LOGIT_BYTES, self.logit_bytes // 2)
            logger.warning(
                "out of GPU memory with one sequence of %d tokens; its logits now in chunks of %d MiB",
                length,
                self.logit_bytes >> 20,
            )
            return
        if rows <= 1:
            raise UserError(
                f"out of GPU memory with a single sequence of {length} tokens; lower eval_len or max_length, or give "
                "the KV cache less: cache_tokens=0 if nothing is generated"
            )
        half = rows // 2
        logger.warning("out of GPU memory with %d × %d tokens; going on with %d at a time", rows, length, half)
        self.logit_bytes = max(_LEAST_LOGIT_BYTES, self.logit_bytes // 2)
        self.tokens = min(self.tokens, half * length)
        if self.asked is not None:
            self.asked = min(self.asked, half)

    def run(
        self,
        count: int,
        length: int,
        forward: Callable[[int, int], Sequence[torch.Tensor]],
        landed: Callable[[int, int, list[np.ndarray]], None],
    ) -> None:
        """`forward(start, stop)` over `count` rows of one length, batch by batch, and what it returns to `landed`.

        landed: given start, stop and the tensors as arrays, two batches late, while the GPU goes on. Nothing waits for
        the GPU but to stay two batches behind it.
        """
        flying: collections.deque[tuple[int, int, Fetched]] = collections.deque()
        start = 0
        while start < count:
            stop = min(start + self.rows(length), count)
            try:
                flying.append((start, stop, Fetched(forward(start, stop))))
                failed = False
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            if failed:  # outside of `except`, where the traceback would keep the tensors
                release_memory()
                self.shrink(stop - start, length)
                continue
            start = stop
            if len(flying) > 2:
                first, last, fetched = flying.popleft()
                landed(first, last, fetched.arrays())
        for first, last, fetched in flying:
            landed(first, last, fetched.arrays())


class Fetched:
    """Tensors on their way from the GPU, right behind the work that makes them."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._event = None
        self._tensors = list(tensors)
        if any(t.is_cuda for t in tensors):
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self._tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def arrays(self) -> list[np.ndarray]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._tensors]
