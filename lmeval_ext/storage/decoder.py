"""Find the decoder of a checkpoint, and give every weight its role.

The decoder is the stack of numbered layers that the token embedding belongs to. Its scope is the part of the names that
embedding and layers share: "model", or "language_model.model" in a composite model. What lies outside the scope is not
of the decoder, whatever it is called: vision and audio towers, projectors, speech heads. Beside the layers, inside the
scope, known names decide (`roles`); an unknown one leaves the layer figures null, because a guess would be worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lmeval_ext.storage.pieces import Piece
from lmeval_ext.storage.roles import (
    DECODER_PARTS,
    DRAFTS,
    ENCODER_STACKS,
    HEAD_MODULES,
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
    quantization: the quantization config. precision: the one that is counted of a checkpoint that holds several; None:
    all of them.
    """

    layers: int | None = None
    vocabulary: int | None = None
    hidden: int | None = None
    multimodal: bool = False
    encoder_decoder: bool = False
    transforms: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    precision: int | None = None


@dataclass(frozen=True)
class Decoder:
    """Where the decoder of a checkpoint is.

    stack: the name of its numbered layers, None if there are none. scope: what the names of embedding and layers
    share. embedding: the token embedding. heads: the output matrices. towers: components below the scope that are of
    another modality by their structure. shared: whether every part for other modalities lies beside the layers.
    rivals: other stacks that may as well be the decoder. modules: names of the matrices in the layers.
    """

    facts: Facts
    stack: str | None
    scope: Path
    embedding: Piece | None
    heads: tuple[Piece, ...]
    towers: frozenset[str]
    shared: bool
    rivals: frozenset[str]
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
        if piece.stack in self.rivals:
            return "unknown" if piece.matrix else "other"
        if self._is_foreign(piece, path):
            return "vision"
        if not piece.matrix or path[-1].endswith("bias") or NORM.search(path[-1]):
            return "other"
        return self._role_beside_the_layers(piece, path)

    def _role_beside_the_layers(self, piece: Piece, path: Path) -> Role:
        below = path[len(self.scope) :] if path[: len(self.scope)] == self.scope else path
        if any(map(DECODER_PARTS.match, below)) or self._is_text_stack(piece) or _is_in_head(path):
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
            if not self.towers.isdisjoint(path[len(self.scope) : len(self.scope) + 1]):
                return True
            return self.shared and piece.matrix and self._role_beside_the_layers(piece, path) == "unknown"
        if not piece.matrix:
            return self.facts.multimodal and not _is_prefix(path[:-1], self.scope)
        if self._is_text_stack(piece) or (_is_in_head(path) and _is_above(path, self.scope)):
            return False
        return self.facts.multimodal or not is_embedding(path[-1])

    def _is_text_stack(self, piece: Piece) -> bool:
        """Return whether a stack beside the decoder's holds layers for text."""
        if piece.stack is None or (self.facts.multimodal and not self.facts.encoder_decoder):
            return False
        return bool(
            TEXT_STACKS.match(piece.stack) or (self.facts.encoder_decoder and ENCODER_STACKS.search(piece.stack))
        )


def _weight(piece: Piece, role: Role, numbers: Sequence[str], elements: int | None) -> Weight:
    count = len(numbers) * piece.copies
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
    pairs.sort(key=lambda pair: pair[:2])
    rank, _, stack, embedding = pairs[0] if pairs else (None, 0, None, None)
    # An equal match of another embedding with another stack leaves it open which of the two is the decoder.
    rivals = {name for other, _, name, table in pairs if rank and other[:-1] == rank[:-1] and table is not embedding}
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
    separate = not facts.multimodal or not LANGUAGE_MODELS.isdisjoint(scope)
    towers = frozenset() if separate else _towers(matrices, stack, scope)
    shared = not separate and not outside
    modules = frozenset(piece.module for piece in stacks.get(stack, ())) if stack is not None else frozenset()
    return Decoder(facts, stack, scope, embedding, heads, towers, shared, frozenset(rivals - {stack}), modules)


def _towers(matrices: Sequence[Piece], stack: str | None, scope: Path) -> frozenset[str]:
    """Return the components below the scope, other than known parts, that have numbered layers or kernels of images."""
    names = {
        piece.path[len(scope)]
        for piece in matrices
        if piece.path[: len(scope)] == scope
        and len(piece.path) > len(scope)
        and piece.stack != stack
        and (piece.stack is not None or len(piece.shape or ()) >= 4)
    }
    own = set(stack.split(".")[len(scope) : len(scope) + 1]) if stack else set()
    return frozenset(
        name for name in names - own if not DECODER_PARTS.match(name) and name not in HEAD_MODULES | {"decoder"}
    )


def _is_in_head(path: Path) -> bool:
    return not HEAD_MODULES.isdisjoint(path[:-1])


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
    bits = sum(piece.bits * len(piece.numbers) * piece.copies for piece in members)
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
    named = [piece for piece in others if piece.path[-1] in HEADS]
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
    if piece.path[-1] not in HEADS_BESIDE_THE_LAYERS and not _is_in_head(piece.path):
        return False
    rows = facts.vocabulary or (max(embedding.shape) if embedding and embedding.shape else None)
    return rows is None or piece.shape is None or any(rows <= size < rows + _PADDING for size in piece.shape)


def _is_above(path: Path, scope: Path) -> bool:
    """Return whether a weight lies beside the layers, or in a module around the decoder."""
    parent = path[:-1]
    while parent and parent[-1] in HEAD_MODULES:
        parent = parent[:-1]
    return _is_prefix(parent, scope)


def _is_prefix(prefix: Path, path: Path) -> bool:
    return path[: len(prefix)] == prefix


def _common(one: Path, other: Path) -> Path:
    """Return the components that two names begin with alike."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
