"""Choosing what is meant: by glob over the names of weights and axes, by module, by a function of the name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from secateur.errors import SpecError

Choice = str | nn.Module | Callable[[str], bool]
"""A glob, a module of the model, which means all its tensors, or a function of the name."""


def chosen(wish: Choice | Sequence[Choice], names: Iterable[str], model: nn.Module, what: str) -> set[str]:
    """The names that any of the choices means. One that means nothing raises SpecError, naming close ones."""
    known = list(names)
    found: set[str] = set()
    for choice in wish if isinstance(wish, (list, tuple, set, frozenset)) else (wish,):
        if isinstance(choice, str):
            found |= matching([choice], known, what)
        elif isinstance(choice, nn.Module):
            found |= _within(choice, model, what)
        elif callable(choice):
            accepted = {name for name in known if choice(name)}
            if not accepted:
                raise SpecError(f"{what} by a function accepts none of the {len(known)} names, such as {known[:3]}")
            found |= accepted
        else:
            raise SpecError(f"{what} is a glob, a module or a function of the name, found {type(choice).__name__}")
    return found


def _within(module: nn.Module, model: nn.Module, what: str) -> set[str]:
    """Every name of the module's parameters and buffers in the model."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found = {name for name, tensor in named if id(tensor) in own}
    if not found:
        reason = "has no parameters" if not own else f"is no part of this {type(model).__name__}"
        raise SpecError(f"{what} by module: the {type(module).__name__} given {reason}; give one of the model's layers")
    return found


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
