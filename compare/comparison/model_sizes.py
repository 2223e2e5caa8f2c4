"""Whether two results are from the same model, judged by its number of weights and its architecture.

Quantization changes neither, so results that differ in one are from different models: no line joins them, and none is
compared with the other's baseline. (The decoders of Llama 3 8B and Mistral 7B have equally many weights.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from compare.results.records import Quantization, Record

# Relative. Some formats pad a vocabulary or store a tied output matrix separately; real model sizes differ by far more.
TOLERANCE = 0.02


def parameters(q: Quantization) -> float | None:
    """Logical elements of all tensors, from bytes and bits per weight; None where a result lacks one of them."""
    return None if not q.weight_bytes or not q.file_bpw else q.weight_bytes * 8 / q.file_bpw


def model_clusters(records: Sequence[Record]) -> list[int | None]:
    """The model number of each record: 0 for the most frequent model, 1 for the next …; None where it is unknown.

    Models of one size are told apart by architecture, if results of that size name several; a result that names none is
    then of an unknown model.
    """
    sizes = _size_clusters(records)
    names: dict[int, set[str]] = {}
    for size, record in zip(sizes, records, strict=True):
        if size is not None and record.quantization.architecture:
            names.setdefault(size, set()).add(record.quantization.architecture)
    models: list[tuple[int, str] | None] = []
    for size, record in zip(sizes, records, strict=True):
        several = size is not None and len(names.get(size, ())) > 1
        name = record.quantization.architecture if several else ""
        models.append(None if size is None or (several and not name) else (size, name))
    counts = Counter(model for model in models if model is not None)
    order = sorted(counts, key=lambda model: (-counts[model], model))
    return [None if model is None else order.index(model) for model in models]


def _size_clusters(records: Sequence[Record]) -> list[int | None]:
    """The size number of each record, from the smallest; None for unknown sizes.

    The size is that of the decoder's matrices if every sized result has it (it does not depend on how the output matrix
    is stored), else of all tensors. If there is one size only, results of unknown size are taken for that size.
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
    return [None if not size else max(i for i, start in enumerate(starts) if start <= size) for size in sizes]


def model_text(records: Sequence[Record]) -> str:
    """``about 134.5 million weights, llama``, or ``unknown size``, for the records of one cluster."""
    architectures = sorted({r.quantization.architecture for r in records} - {""})
    return ", ".join([_size_text(records), *architectures])


def _size_text(records: Sequence[Record]) -> str:
    sizes = [size for r in records if (size := parameters(r.quantization) or r.quantization.layer_parameters)]
    if not sizes:
        return "unknown size"
    size = max(sizes)
    return f"about {size / 1e9:.2f} billion weights" if size >= 1e9 else f"about {size / 1e6:.1f} million weights"
