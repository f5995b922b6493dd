"""Choosing by name: globs over the names of weights and axes."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from secateur.errors import SpecError


def matching(globs: Iterable[str], names: Iterable[str], what: str) -> set[str]:
    """The names that match any of the globs. A glob that matches nothing raises SpecError, naming close ones."""
    known = list(names)
    chosen: set[str] = set()
    for glob in globs:
        found = fnmatch.filter(known, glob)
        if not found:
            close = difflib.get_close_matches(glob, known, n=3, cutoff=0.4) or known[:3]
            raise SpecError(f"{what} {glob!r} matches nothing; close names are {', '.join(map(repr, close))}")
        chosen.update(found)
    return chosen
