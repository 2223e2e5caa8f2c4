"""How many rows a forward takes, how results leave the GPU, and what happens when memory runs out."""

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

# Tokens per forward, if memory allows: far more than fill a GPU, so that the time to launch kernels does not count.
MAX_TOKENS = 32768
MAX_ROWS = 64  # of one forward with batch_size=auto
MAX_LOGIT_BYTES = 2 << 30  # logits in memory at a time
CPU_LOGIT_BYTES = 64 << 20  # the same on a CPU, where memory is not measured; the lowest start on a GPU
MIN_LOGIT_BYTES = 16 << 20  # chunks of logits are not halved below this
_IN_FLIGHT = 2  # batches whose results are still being copied while the next one is launched


class Batching:
    """Rows per forward: as given, or chosen from free memory; halved for good when memory runs out.

    batch_size: rows, or "auto". max_batch_size: the most rows that "auto" takes.
    """

    def __init__(self, engine: Engine, batch_size: int | str = "auto", max_batch_size: int | None = None) -> None:
        self.engine = engine
        self.fixed_rows = None if str(batch_size).startswith("auto") else int(batch_size)
        self.max_rows = int(max_batch_size or MAX_ROWS)
        free = free_bytes(engine.device)
        self.tokens = MAX_TOKENS
        self.logit_bytes = MAX_LOGIT_BYTES if free is not None else CPU_LOGIT_BYTES
        if free is not None:
            self.tokens = max(1, min(MAX_TOKENS, free // 2 // max(1, engine.bytes_per_token)))
            self.logit_bytes = max(CPU_LOGIT_BYTES, min(MAX_LOGIT_BYTES, free // 4))
        if engine.token_limit is not None:
            self.tokens = min(self.tokens, engine.token_limit)

    def rows(self, length: int) -> int:
        """Returns how many rows of `length` tokens one forward takes."""
        if self.fixed_rows is None:
            return max(1, min(self.max_rows, self.tokens // length))
        limit = self.engine.token_limit
        return max(1, self.fixed_rows if limit is None else min(self.fixed_rows, limit // length))

    def logit_rows(self) -> int:
        """Returns at how many positions logits are computed at a time."""
        return max(1, self.logit_bytes // (2 * self.engine.columns))

    def shrink(self, rows: int, length: int) -> None:
        """Lowers the limits after `rows` rows of `length` tokens, or the logits of a single row, ran out of memory.

        Raises UserError if one row does not fit with few logits at a time.
        """
        if rows <= 1 and self.logit_bytes > MIN_LOGIT_BYTES:
            self.logit_bytes = max(MIN_LOGIT_BYTES, self.logit_bytes // 2)
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
        self.logit_bytes = max(MIN_LOGIT_BYTES, self.logit_bytes // 2)
        self.tokens = min(self.tokens, half * length)
        if self.fixed_rows is not None:
            self.fixed_rows = min(self.fixed_rows, half)

    def run(
        self,
        count: int,
        length: int,
        forward: Callable[[int, int], Sequence[torch.Tensor]],
        receive: Callable[[int, int, list[np.ndarray]], None],
    ) -> None:
        """Calls `forward(start, stop)` over `count` rows of one length, batch by batch, and `receive` with the results.

        receive: takes start, stop and the tensors as arrays, two batches late, so that the GPU is never idle.
        """
        in_flight: collections.deque[tuple[int, int, HostCopy]] = collections.deque()
        start = 0
        while start < count:
            stop = min(start + self.rows(length), count)
            try:
                in_flight.append((start, stop, HostCopy(forward(start, stop))))
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
            if len(in_flight) > _IN_FLIGHT:
                first, last, copy = in_flight.popleft()
                receive(first, last, copy.arrays())
        for first, last, copy in in_flight:
            receive(first, last, copy.arrays())


class HostCopy:
    """A copy of tensors to main memory, queued behind the GPU work that computes them."""

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
        """Waits for the copy; returns it as arrays."""
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._tensors]
