"""Collects the tensors of compact safetensors headers that differ in the layer's number alone.

Layers and experts repeat: after one layer, the text of the next is known but for its number and its offsets. So the
reader writes what 64 entries should be (`_Stretch`), and compares. Where they differ, it reads entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from lmeval_ext.storage.tensors import Form, Run, cut

_LAYERS = "layers."
_OFFSETS = ',"data_offsets":['
END = '},"'  # of an entry, with the quotation mark of the next one
_NUMBER = "\0"  # stands for the layer's number; a compact header has no control characters
_LENGTH = 64  # entries per stretch
_PAUSE = 256  # entries that are read one by one after a stretch was not as expected


class _Entry:
    """A kind of entry of a stack "…layers": its run, and its text from the layer's number to the offsets."""

    __slots__ = ("described", "following", "place", "prefix", "rest", "run", "stretch")

    def __init__(self, prefix: str, described: str, run: Run, place: int) -> None:
        self.prefix, self.described, self.run, self.place = prefix, described, run, place
        self.rest = described[: described.index('"')]
        self.following: _Entry | None = None  # what followed last time, in the same layer
        self.stretch: _Stretch | None = None


class _Stretch:
    """Entries that followed each other in one layer, and their text with "%d" for the offsets."""

    __slots__ = ("entries", "forms", "rests", "sizes", "text")

    def __init__(self, first: _Entry) -> None:
        entries = [first]
        while (following := entries[-1].following) is not None and following.place % _LENGTH:
            entries.append(following)
            if len(entries) > _LENGTH:
                break
        self.entries = entries
        self.forms = [entry.run.form for entry in entries]
        self.sizes = [form.nbytes for form in self.forms]
        self.rests = [entry.rest for entry in entries]
        head = first.prefix + _LAYERS + _NUMBER + "."
        self.text = "".join(
            (head + entry.described + _OFFSETS).replace("%", "%%") + "%d,%d]" + END for entry in entries
        )

    def expected(self, number: str, position: int) -> tuple[str, int]:
        """Return the text for a layer whose first offset is `position`, and the last offset."""
        ends = list(accumulate(self.sizes, initial=position))
        offsets = [0] * (2 * len(self.sizes))
        offsets[0::2], offsets[1::2] = ends[:-1], ends[1:]
        return self.text.replace(_NUMBER, number) % tuple(offsets), ends[-1]


class Runs:
    """The runs of all headers that were read with it.

    form_of: from the text of a form to the form; raises ValueError for any other text. file: number of the header that
    is being read, from 0 on. all: every run. complete: whether every header was compact.
    """

    def __init__(self, form_of: Callable[[str], Form]) -> None:
        self.file = -1
        self.complete = True
        self.all: list[Run] = []
        # The entries of stacks "…layers", by what stands before that word and by their text; the other runs, by stack
        # and text.
        self._regular: dict[str, dict[str, _Entry]] = {}
        self._others: dict[tuple[str | None, str], Run] = {}
        self._forms: dict[str, Form] = {}
        self._form_of = form_of

    def scan(self, text: str) -> tuple[list[str], list[Form], int]:
        """Read the entries of one header.

        text: from the first name on, each entry with its END. Returns the names, the forms and the size of the data.
        Raises ValueError for a text that is not compact, or whose tensors do not follow each other without holes.
        """
        names: list[str] = []
        forms: list[Form] = []
        place = position = 0
        root: str | None = None
        known: dict[str, _Entry] = {}
        last: _Entry | None = None
        entry: _Entry | None
        layer, pause = "", 0
        while place < len(text):
            if last is not None and not pause and (start := last.following) is not None and not start.place % _LENGTH:
                stretch = start.stretch = start.stretch or _Stretch(start)
                expected, end = stretch.expected(layer, position)
                if text.startswith(expected, place):
                    for foreseen in stretch.entries:
                        foreseen.run.numbers.append(layer)
                    head = start.prefix + _LAYERS + layer + "."
                    names += [head + rest for rest in stretch.rests]
                    forms += stretch.forms
                    position = end
                    place += len(expected)
                    last = stretch.entries[-1]
                    continue
                start.stretch = None
                pause = _PAUSE
            pause -= pause > 0
            stop = text.index(END, place)
            line = text[place:stop]
            place = stop + len(END)
            # model.layers.3.mlp.up_proj.weight":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]
            prefix, _, rest = line.partition(_LAYERS)
            number, _, rest = rest.partition(".")
            described, _, span = rest.rpartition(_OFFSETS)
            if prefix != root:
                root, known = prefix, self._regular.get(prefix, {})
            entry = known.get(described)
            if entry is not None and number.isdigit():
                run = entry.run
            else:
                run, entry, number, span = self._find(line, len(names))
                known = self._regular.get(prefix, {})
            if last is not None and entry is not None and number == layer and last.prefix == entry.prefix:
                last.following = entry
            last, layer = entry, number
            end = position + run.form.nbytes
            if span != f"{position},{end}]":
                raise ValueError(line)
            position = end
            run.numbers.append(number)
            forms.append(run.form)
            names.append(line[: line.index('"')])
        return names, forms, position

    def _find(self, line: str, index: int) -> tuple[Run, _Entry | None, str, str]:
        """Return the run of any entry, the entry if it is of a stack "…layers", its layer's number and its offsets.

        Raises ValueError if it has no form.
        """
        prefix, found, below = line.partition(_LAYERS)
        if prefix in self._regular:
            number, _, text = below.partition(".")
            text, _, span = text.rpartition(_OFFSETS)
            if number.isdigit() and text:
                name_end = text.index('":{')
                run = self._new(prefix + "layers", "." + text[:name_end], text[name_end + 3 :], index)
                new = self._regular[prefix][text] = _Entry(prefix, text, run, len(self._regular[prefix]))
                return run, new, number, span
        name_end, form_end = line.index('":{'), line.rindex(_OFFSETS)
        stack, number, rest = cut(line[:name_end])
        text = rest + line[name_end:form_end]
        run = self._others.get((stack, text)) or self._new(stack, rest, line[name_end + 3 : form_end], index)
        entry: _Entry | None = None
        if found and stack == prefix + "layers":
            entry = _Entry(prefix, text[1:], run, 0)
            self._regular[prefix] = {entry.described: entry}
        else:
            self._others[stack, text] = run
        return run, entry, number, line[form_end + len(_OFFSETS) :]

    def _new(self, stack: str | None, rest: str, described: str, index: int) -> Run:
        form = self._forms.get(described)
        if form is None:
            form = self._forms[described] = self._form_of(described)
        run = Run(stack, rest, form, index, self.file)
        self.all.append(run)
        return run
