"""The model that a label on the command line names: ``--versus LABEL``, ``--baseline LABEL``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from compare.errors import CompareError
from compare.text import and_more


def find_label(labels: Sequence[str], asked: str, flag: str, of: str = "") -> str:
    """The label that is `asked`, or the only one that contains it, in any case.

    of: what the labels are of, for messages. Raises CompareError if no label, or several, match.
    """
    folded = asked.strip().casefold()
    for matches in (
        [label for label in labels if label == asked.strip()],
        [label for label in labels if label.casefold() == folded],
        [label for label in labels if folded and folded in label.casefold()],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CompareError(f"{flag} {asked}: several models have such a label: {and_more(matches)}")
    close = difflib.get_close_matches(asked, labels, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"labels: {and_more(sorted(set(labels)), 20)}"
    raise CompareError(f"{flag} {asked}: no model{of} has such a label; {hint}")
