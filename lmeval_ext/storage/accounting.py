"""From weights to figures: `account` sums up every format by the same convention, that of `StorageInfo`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lmeval_ext.storage.info import Excluded, StorageInfo
from lmeval_ext.storage.tensors import Weight

KINDS = {"token_embedding": "embedding"}  # roles whose kind in `Excluded` has another name
NAMED_PROBLEMS = 3  # the notes quote this many problems and count the rest


def account(
    weights: Sequence[Weight],
    *,
    family: str | None,
    scheme: str | None,
    tied: bool | None,
    notes: Iterable[str] = (),
    unsupported: str | None = None,
) -> StorageInfo:
    """Sum up the weights of a checkpoint by the convention of `StorageInfo`.

    tied: whether the token embedding is the output matrix, None if unknown. unsupported: why the element counts of
    this checkpoint cannot be trusted; then every bits-per-weight figure is None.
    """
    remarks = list(notes)
    layer = [weight for weight in weights if weight.role == "layer"]
    head = [weight for weight in weights if weight.role == "head"]
    embedding = [weight for weight in weights if weight.role == "token_embedding"]
    unknown = [weight for weight in weights if weight.role == "unknown"]
    head_is_embedding = not head and tied is True and sum(weight.copies for weight in embedding) == 1
    if head_is_embedding:
        head = embedding
        remarks.append(f"tied: head_bpw is of the embedding matrix {embedding[0].name[:200]!r}")
    used = {id(weight) for weight in (*layer, *head)}
    rest = [weight for weight in weights if id(weight) not in used]

    problems = [(weight.problem, weight.copies) for weight in weights if weight.problem]
    if unsupported:
        remarks.append(unsupported)
    else:
        remarks += [problem for problem, _ in problems[:NAMED_PROBLEMS]]
        more = sum(copies for _, copies in problems) - len(problems[:NAMED_PROBLEMS])
        if more:
            remarks.append(f"and {more} more weights that cannot be read")

    def elements(part: Sequence[Weight]) -> int | None:
        counts = [weight.elements for weight in part]
        return None if unsupported or None in counts else sum(count for count in counts if count is not None)

    all_bits = sum(weight.bits for weight in weights)
    layer_elements, head_elements, all_elements = elements(layer + unknown), elements(head), elements(weights)
    if unknown:
        remarks.append("layer_bpw and vram_gb are null: not every weight can be assigned")
        layer_elements = None
    elif layer_elements == 0:
        remarks.append("no weight matrix of a language model's layers: layer_bpw and vram_gb are null")
    if head_elements == 0:
        why = "the output matrix is empty" if head else _why_no_head(tied, len(embedding))
        remarks.append(f"{why}: head_bpw and vram_gb are null")
    # The tensors of an unknown packing cannot be told from norms and biases, so their bits are not known either.
    layer_bits = sum(weight.bits for weight in layer) if layer_elements is not None else None
    head_bits = sum(weight.bits for weight in head) if head_elements else None
    return StorageInfo(
        layer_bpw=_ratio(layer_bits, layer_elements),
        head_bpw=_ratio(head_bits, head_elements),
        vram_gb=(layer_bits + head_bits) / 8 / 1024**3 if layer_bits and head_bits else None,
        file_bpw=_ratio(all_bits, all_elements),
        weight_bytes=all_bits // 8,
        family=family,
        scheme=scheme,
        tied=head_is_embedding if head else tied,
        layer_bits=layer_bits,
        layer_elements=layer_elements,
        head_bits=head_bits,
        head_elements=head_elements or None,
        elements=all_elements,
        excluded=_by_kind(rest, elements),
        notes=tuple(remarks),
    )


def _by_kind(rest: Sequence[Weight], elements: Callable[[Sequence[Weight]], int | None]) -> tuple[Excluded, ...]:
    """Sum up the weights outside layers and head by kind; elements: counts the elements of several weights."""
    groups: dict[str, list[Weight]] = {}
    for weight in rest:
        groups.setdefault(KINDS.get(weight.role, weight.role), []).append(weight)
    return tuple(Excluded(kind, sum(w.bits for w in part), elements(part)) for kind, part in sorted(groups.items()))


def _ratio(bits: int | None, elements: int | None) -> float | None:
    return bits / elements if elements and bits is not None else None


def _why_no_head(tied: bool | None, embeddings: int) -> str:
    if tied is None:
        return "no output matrix is stored, and nothing says that the model is tied"
    if tied and embeddings != 1:
        return f"the model is tied, but {embeddings} token embedding matrices are stored"
    return "config.json says tie_word_embeddings=false, but no output matrix is stored"


def main_packing(weights: Sequence[Weight], dense: frozenset[str]) -> str | None:
    """Return the packing that stores most bits of the layers, None without weights.

    dense: packings that are not quantized; they count only if all layers are stored so.
    """
    layer = [weight for weight in weights if weight.role == "layer"] or list(weights)
    packed = [weight for weight in layer if weight.packing not in dense] or layer
    bits: Counter[str] = Counter()
    for weight in packed:
        bits[weight.packing] += weight.bits
    return bits.most_common(1)[0][0] if bits else None
