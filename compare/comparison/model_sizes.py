"""Whether two results are of the same model, as far as its size tells.

A quantization leaves the number of weights as it is, so results that differ in it are of different models: no line
joins them, and none is measured against the other's reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from compare.results.records import Quantization, Record

# Some formats pad a vocabulary or store a tied output matrix of its own; sizes that people offer differ by far more.
TOLERANCE = 0.02


def parameters(q: Quantization) -> float | None:
    """Logical elements of all tensors, from bytes and bits per weight; None where a result does not say."""
    return None if not q.weight_bytes or not q.file_bpw else q.weight_bytes * 8 / q.file_bpw


def size_clusters(records: Sequence[Record]) -> list[int | None]:
    """A number for each record: 0 for the model size that most have, 1 for the next …; None for unknown sizes.

    Sizes are those of the decoder's matrices where every sized result says it (it does not depend on how the output
    matrix is stored), else of all tensors. With one size only, results of unknown size are taken for that one.
    """
    known = [r.quantization for r in records if r.quantization.layer_parameters or parameters(r.quantization)]
    by_layers = all(q.layer_parameters for q in known)
    sizes = [(r.quantization.layer_parameters if by_layers else parameters(r.quantization)) for r in records]
    starts: list[float] = []
    for size in sorted(size for size in sizes if size):
        if not starts or size > starts[-1] * (1 + TOLERANCE):
            starts.append(size)
    if len(starts) < 2:
        return [0] * len(records)
    found = [None if not size else max(i for i, start in enumerate(starts) if start <= size) for size in sizes]
    counts = Counter(number for number in found if number is not None)
    order = sorted(counts, key=lambda number: (-counts[number], number))
    return [None if number is None else order.index(number) for number in found]


def size_text(records: Sequence[Record]) -> str:
    """``about 134.5 million weights``, for a cluster; ``unknown size``."""
    sizes = [size for r in records if (size := parameters(r.quantization) or r.quantization.layer_parameters)]
    if not sizes:
        return "unknown size"
    size = max(sizes)
    return f"about {size / 1e9:.2f} billion weights" if size >= 1e9 else f"about {size / 1e6:.1f} million weights"
