"""Damages files: bytes changed, cut or doubled; JSON documents with parts replaced by unexpected values."""

from __future__ import annotations

import json
from random import Random
from typing import Any

# Counts, lengths and offsets that have broken readers: around 0, and around the limits of 8 to 64 bits.
NUMBERS = (0, 1, 2, 3, 7, 8, 31, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
           2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, -1e-320,
    float("nan"), float("inf"), "", " ", "x", "none", "NaN", "../x", "/etc/passwd", "a\x00b", "\ud800", "\u202e",
    "é" * 40, "x" * 3000, "2001-99-99", "1:2:3", "[red] x", "%s{0}", [], {}, [[]], {"": {}}, [None] * 50,
)  # fmt: skip


def damage(data: bytes, random: Random) -> bytes:
    """Returns the bytes with one to four changes."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        raw = _CHANGES[random.randrange(len(_CHANGES))](raw, random)
    return bytes(raw)


def _at(raw: bytearray, random: Random) -> int:
    """Returns a position, mostly in the first bytes, where headers are."""
    end = len(raw) if random.random() < 0.5 else min(len(raw), 64)
    return random.randrange(end) if end else 0


def _flip(raw: bytearray, random: Random) -> bytearray:
    if raw:
        raw[_at(raw, random)] ^= 1 << random.randrange(8)
    return raw


def _set(raw: bytearray, random: Random) -> bytearray:
    if raw:
        raw[_at(raw, random)] = random.randrange(256)
    return raw


def _cut(raw: bytearray, random: Random) -> bytearray:
    return raw[: _at(raw, random)]


def _remove(raw: bytearray, random: Random) -> bytearray:
    at = _at(raw, random)
    del raw[at : at + random.choice((1, 2, 4, 8, 100))]
    return raw


def _double(raw: bytearray, random: Random) -> bytearray:
    at = _at(raw, random)
    part = raw[at : at + random.choice((1, 8, 64, 1000))]
    return raw[:at] + part * random.choice((1, 1, 3, 100)) + raw[at:]


def _number(raw: bytearray, random: Random) -> bytearray:
    """Overwrites 1 to 8 bytes with a number, little or big endian."""
    size, at = random.choice((1, 2, 4, 8)), _at(raw, random)
    value = random.choice(NUMBERS) + random.choice((0, 0, 1, -1))
    raw[at : at + size] = (value % 256**size).to_bytes(size, random.choice(("little", "little", "big")))
    return raw


def _digits(raw: bytearray, random: Random) -> bytearray:
    """Inserts text: digits, quotes, brackets."""
    at = _at(raw, random)
    raw[at:at] = random.choice(_TEXTS)
    return raw


_TEXTS = (
    b"9", b"9" * 5000, b"-", b'"', b"\\", b"[", b"{" * 2000, b"[" * 20_000, b"]", b"&a", b"*a", b"\xff", b"\x00", b"\n",
    b"\t", b": ", b"? ", b"!!python/object:os.system ", b"<<: ", b"---\n",
)  # fmt: skip


_CHANGES = (_flip, _set, _cut, _remove, _double, _number, _digits)


def damage_json(document: Any, random: Random) -> Any:
    """Returns a copy of `document` with one to five parts replaced, removed, renamed or moved."""
    copy = _copy(document)
    for _ in range(random.choice((1, 1, 2, 5))):
        places = list(_places(copy))
        if len(places) > 5000:  # lists doubled repeatedly: the reader must take the time, not the damage
            break
        if not places:
            return _copy(random.choice(SCALARS))
        parent, key = random.choice(places)
        what = random.random()
        if what < 0.6:
            parent[key] = _copy(random.choice(SCALARS))
        elif what < 0.7:
            other, place = random.choice(places)
            parent[key] = _copy(other[place])
        elif what < 0.8:
            for _ in range(random.choice((3, 60))):
                parent[key] = random.choice(([parent[key]], {"a": parent[key]}))
        elif isinstance(parent, dict):
            value = parent.pop(key)
            if what < 0.9:
                parent[str(random.choice(SCALARS))[:50]] = value
        else:
            parent *= random.choice((0, 2, 30))
    return copy


def _copy(document: Any) -> Any:
    return json.loads(json.dumps(document))


def _places(document: Any) -> list[tuple[Any, Any]]:
    places, todo = [], [document]
    while todo:
        at = todo.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            places.append((at, key))
            todo.append(at[key])
    return places


def dump(document: Any, random: Random) -> bytes:
    """Returns the document as JSON, with NaN and lone surrogates, sometimes in another encoding."""
    text = json.dumps(document, ensure_ascii=random.random() < 0.7)
    encoding = random.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig"))
    return text.encode(encoding, "surrogatepass")
