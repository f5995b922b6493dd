"""How many units each place keeps: a small table that people can read and edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import DataError, PlanError


@dataclass(frozen=True)
class Allocation:
    """Per place (a weight's or an axis's name) how many units stay, of how many."""

    kept: Mapping[str, int]
    total: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.kept.keys() != self.total.keys():
            raise PlanError("an allocation names other places in 'kept' than in 'total'; expected the same")
        for place, kept in self.kept.items():
            total = self.total[place]
            if not (isinstance(kept, int) and isinstance(total, int) and 0 <= kept <= total):
                raise PlanError(f"allocation of {place!r} keeps {kept!r}; expected 0 to {total!r} units")

    def to_json(self) -> str:
        """``{"place": [kept, total], …}``"""
        return json.dumps({place: [kept, self.total[place]] for place, kept in self.kept.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """Read what ``to_json`` wrote. Raises DataError for anything else, PlanError for impossible counts."""
        try:
            table = json.loads(text)
            pairs = {str(place): (kept, total) for place, (kept, total) in table.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f'an allocation is JSON of the form {{"place": [kept, total]}}; found: {error}') from error
        return cls({p: k for p, (k, _) in pairs.items()}, {p: t for p, (_, t) in pairs.items()})
