"""Find the decoder of a checkpoint, and give every weight its role.

The decoder is the stack of numbered layers that the token embedding belongs to. Its scope is the part of the names that
embedding and layers share: "model", or "language_model.model" in a composite model. What lies outside the scope is not
of the decoder, whatever it is called: vision and audio towers, projectors, speech heads. Beside the layers, inside the
scope, known names decide (`roles`); an unknown one leaves the layer figures null, because a guess would be worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from lmeval_ext.storage.pieces import Piece
from lmeval_ext.storage.roles import (
    DECODER_PARTS,
    DRAFTS,
    ENCODER_STACKS,
    HEADS,
    HEADS_BESIDE_THE_LAYERS,
    LANGUAGE_MODELS,
    LAYER_LISTS,
    NORM,
    POSSIBLE_TOKEN_EMBEDDINGS,
    TEXT_STACKS,
    TOKEN_EMBEDDINGS,
    TRANSFORM,
    is_embedding,
    is_routing,
    layer_role,
    of_another_modality,
)
from lmeval_ext.storage.tensors import Role, Weight

Path = tuple[str, ...]  # the components of a name
_PADDING = 1024  # rows that a format may add to a vocabulary


@dataclass(frozen=True)
class Facts:
    """What config.json says of the decoder; None or False where it says nothing.

    layers: `num_hidden_layers`; later layers are draft layers, which is how DeepSeek and GLM store MTP. vocabulary,
    hidden: rows and columns of the token embedding. multimodal: whether the model takes more than text.
    encoder_decoder: whether an encoder of text stands before the decoder. transforms: whether weights are rotated.
    """

    layers: int | None = None
    vocabulary: int | None = None
    hidden: int | None = None
    multimodal: bool = False
    encoder_decoder: bool = False
    transforms: bool = False


@dataclass(frozen=True)
class Decoder:
    """Where the decoder of a checkpoint is.

    stack: the name of its numbered layers, None if there are none. scope: what the names of embedding and layers
    share. embedding: the token embedding. heads: the output matrices. shared: whether parts for other modalities lie
    beside the layers. modules: the names of the packed and dense matrices in the layers.
    """

    facts: Facts
    stack: str | None
    scope: Path
    embedding: Piece | None
    heads: tuple[Piece, ...]
    shared: bool
    modules: frozenset[str]

    def weights(self, pieces: Sequence[Piece]) -> list[Weight]:
        """Return the pieces as weights with roles, draft layers apart from the others."""
        weights = []
        drafts = self._draft_layers(pieces)
        for piece in pieces:
            role = self.role(piece)
            elements = 0 if role == "layer" and self._is_transform(piece) else piece.elements
            if piece.stack != self.stack or drafts.isdisjoint(piece.numbers):
                weights.append(_weight(piece, role, piece.numbers, elements))
                continue
            weights.append(_weight(piece, "draft", [number for number in piece.numbers if number in drafts], elements))
            if rest := [number for number in piece.numbers if number not in drafts]:
                weights.append(_weight(piece, role, rest, elements))
        return weights

    def _draft_layers(self, pieces: Iterable[Piece]) -> set[str]:
        """Return the numbers of the decoder's layers that follow its last one."""
        if self.stack is None or self.facts.layers is None:
            return set()
        numbers = set(chain.from_iterable(piece.numbers for piece in pieces if piece.stack == self.stack))
        return {number for number in numbers if len(number) > 9 or int(number) >= self.facts.layers}

    def role(self, piece: Piece) -> Role:
        """Return the role of a weight; for one of the layers, as long as it is not a draft layer."""
        path = piece.path
        if DRAFTS.search(".".join(path)):
            return "draft"
        if piece.stack is not None and piece.stack == self.stack:
            role = layer_role(piece.module, piece.matrix)
            return "layer" if role == "router" and self._is_dense_gate(piece) else role
        if piece is self.embedding:
            return "token_embedding"
        if piece in self.heads:
            return "head"
        if self._is_foreign(piece, path):
            return "vision"
        if not piece.matrix or path[-1].endswith("bias") or NORM.search(path[-1]):
            return "other"
        return self._role_beside_the_layers(piece, path)

    def _role_beside_the_layers(self, piece: Piece, path: Path) -> Role:
        below = path[len(self.scope) :] if path[: len(self.scope)] == self.scope else path
        if any(map(DECODER_PARTS.match, below)) or self._is_text_stack(piece):
            return layer_role(piece.module, True)
        if is_routing(piece.module):
            return "router"
        if is_embedding(path[-1]) or (piece.stack and is_embedding(piece.stack.split(".")[-1])):
            return "embedding"
        return "unknown"

    def _is_dense_gate(self, piece: Piece) -> bool:
        """Return whether a matrix called `gate` is too large for a router: a router has one row per expert."""
        hidden = self.facts.hidden
        return hidden is not None and piece.shape is not None and len(piece.shape) == 2 and min(piece.shape) >= hidden

    def _is_transform(self, piece: Piece) -> bool:
        """Return whether a matrix rotates activations: an overhead of the format, which encodes no weight."""
        parent, _, last = piece.module.rpartition(".")
        return bool(TRANSFORM.search(last)) and (self.facts.transforms or parent in self.modules)

    def _is_foreign(self, piece: Piece, path: Path) -> bool:
        """Return whether a weight that is not in the layers belongs to another modality."""
        inside = path[: len(self.scope)] == self.scope
        if of_another_modality(path[len(self.scope) :] if inside else path):
            return True
        if inside:
            known = not piece.matrix or self._role_beside_the_layers(piece, path) != "unknown"
            return self.shared and not known
        if not piece.matrix:
            return self.facts.multimodal and not _is_prefix(path[:-1], self.scope)
        return not self._is_text_stack(piece) and not (not self.facts.multimodal and is_embedding(path[-1]))

    def _is_text_stack(self, piece: Piece) -> bool:
        """Return whether a stack beside the decoder's holds layers for text."""
        if piece.stack is None or (self.facts.multimodal and not self.facts.encoder_decoder):
            return False
        return bool(
            TEXT_STACKS.match(piece.stack) or (self.facts.encoder_decoder and ENCODER_STACKS.search(piece.stack))
        )


def _weight(piece: Piece, role: Role, numbers: Sequence[str], elements: int | None) -> Weight:
    count = len(numbers)
    problem = piece.problem
    if role == "unknown" and problem is None:
        problem = (
            f"{piece.name(numbers[0])[:200]!r} {list(piece.shape or ())} lies beside the decoder's layers, and nothing "
            "says whether it belongs to them"
        )
    total = None if elements is None else count * elements
    return Weight(piece.name(numbers[0]), role, count * piece.bits, total, piece.packing, problem, count)


def find_decoder(pieces: Sequence[Piece], facts: Facts) -> Decoder:
    """Find the stack of layers, the token embedding and the output matrices among all weights of a checkpoint."""
    matrices = [piece for piece in pieces if piece.matrix and not DRAFTS.search(".".join(piece.path))]
    stacks: dict[str, list[Piece]] = {}
    for piece in matrices:
        if piece.stack is not None:
            stacks.setdefault(piece.stack, []).append(piece)
    flat = [piece for piece in matrices if piece.stack is None]
    embeddings = _embeddings(flat, facts)
    pairs = [
        (_rank(stack, members, embedding, facts), index, stack, embedding)
        for stack, members in stacks.items()
        for index, embedding in enumerate(embeddings or [None])
    ]
    _, _, stack, embedding = min(pairs, key=lambda pair: pair[:2]) if pairs else (None, 0, None, None)
    if stack is None:
        embedding = next(iter(embeddings), None)
    root = tuple(stack.split("."))[:-1] if stack else ()
    scope = (
        root if embedding is None else _common(root, _parent(embedding)) if stack is not None else _parent(embedding)
    )
    heads = _heads(flat, scope, embedding, facts)
    outside = [
        piece
        for piece in matrices
        if piece.path[: len(scope)] != scope and piece not in heads and not is_embedding(piece.path[-1])
    ]
    shared = facts.multimodal and not outside and LANGUAGE_MODELS.isdisjoint(scope)
    modules = frozenset(piece.module for piece in stacks.get(stack, ())) if stack is not None else frozenset()
    return Decoder(facts, stack, scope, embedding, heads, shared, modules)


def _embeddings(flat: Sequence[Piece], facts: Facts) -> list[Piece]:
    """Return the matrices that may be the token embedding."""
    for names in (TOKEN_EMBEDDINGS, POSSIBLE_TOKEN_EMBEDDINGS):
        found = [piece for piece in flat if _named(piece.path, names)]
        if found:
            return found
    rows = [
        piece
        for piece in flat
        if facts.vocabulary is not None
        and facts.vocabulary in (piece.shape or ())
        and HEADS.isdisjoint(piece.path)
        and piece.path[-1] not in HEADS_BESIDE_THE_LAYERS
    ]
    return rows if len(rows) == 1 else []


def _named(path: Path, names: frozenset[str]) -> bool:
    """Return whether a name ends with one of `names`, or with a parameter of a module that is called so."""
    return path[-1] in names or (path[-1] == "embedding" and path[-2:-1] != () and path[-2] in names)


def _parent(embedding: Piece) -> Path:
    """Return the module that an embedding belongs to: "transformer" for "transformer.embedding.word_embeddings"."""
    parent = embedding.path[:-1]
    while parent and is_embedding(parent[-1]):
        parent = parent[:-1]
    return parent


def _rank(stack: str, members: Sequence[Piece], embedding: Piece | None, facts: Facts) -> tuple[int | bool, ...]:
    """Return how well a stack and an embedding fit a decoder; the smallest fits best."""
    root = tuple(stack.split("."))[:-1]
    numbers = {number for piece in members for number in piece.numbers}
    bits = sum(piece.bits * len(piece.numbers) for piece in members)
    distance = 0
    other_modality = of_another_modality(stack.split("."))
    other_vocabulary = False
    if embedding is not None:
        parent = _parent(embedding)
        distance = len(root) + len(parent) - 2 * len(_common(root, parent))
        other_modality |= of_another_modality(embedding.path)
        other_vocabulary = facts.vocabulary is not None and facts.vocabulary not in (embedding.shape or ())
    incomplete = facts.layers is not None and len(numbers) < facts.layers
    unusual = stack.split(".")[-1] not in LAYER_LISTS
    return other_modality, other_vocabulary, distance, unusual, incomplete, -bits


def _heads(flat: Sequence[Piece], scope: Path, embedding: Piece | None, facts: Facts) -> tuple[Piece, ...]:
    """Return the output matrices: by their names, or by the shape of the token embedding if no name is known."""
    others = [piece for piece in flat if piece is not embedding]
    named = [piece for piece in others if not HEADS.isdisjoint(piece.path[-2:])]
    if not named:
        named = [piece for piece in others if _is_above(piece.path, scope) and _is_head(piece, embedding, facts)]
    if not named and embedding is not None:
        named = [
            piece
            for piece in others
            if _is_above(piece.path, scope) and piece.shape == embedding.shape and not is_embedding(piece.path[-1])
        ]
        named = named if len(named) == 1 else []
    named = [piece for piece in named if not of_another_modality(piece.path)] or named
    return tuple([piece for piece in named if _is_above(piece.path, scope)] or named)


def _is_head(piece: Piece, embedding: Piece | None, facts: Facts) -> bool:
    """Return whether a matrix has the name and, as far as it is known, the size of an output matrix."""
    if piece.path[-1] not in HEADS_BESIDE_THE_LAYERS:
        return False
    rows = facts.vocabulary or (max(embedding.shape) if embedding and embedding.shape else None)
    return rows is None or piece.shape is None or any(rows <= size < rows + _PADDING for size in piece.shape)


def _is_above(path: Path, scope: Path) -> bool:
    """Return whether a weight lies beside the layers, or in a module around the decoder."""
    parent = path[:-2] if len(path) > 1 and path[-2] in HEADS | HEADS_BESIDE_THE_LAYERS else path[:-1]
    return _is_prefix(parent, scope)


def _is_prefix(prefix: Path, path: Path) -> bool:
    return path[: len(prefix)] == prefix


def _common(one: Path, other: Path) -> Path:
    """Return the components that two names begin with alike."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
