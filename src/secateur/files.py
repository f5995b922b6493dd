"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import DataError


def write_atomic(path: Path, data: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write ``path`` so that a reader, or a crash, meets the old file or the new one, never a part.

    Strings are written as UTF-8, newlines as they are; pieces one after the other. Missing parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    pieces = [raw] if isinstance(raw, bytes) else raw
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_ordinary(0o666))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file. Raises DataError where it is missing, damaged, or says something twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged, or no JSON file: {error}") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (``object_pairs_hook``) in which no key comes twice; raises ValueError where one does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def require_folder(path: Path) -> None:
    """Raise DataError where ``path``, or what it lies in, is a file, so that nothing can be written there."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise DataError(f"{part} is a file, expected a folder or a free name; choose another one")


@contextmanager
def replace_dir(path: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``path`` once the block has succeeded.

    A block that raises leaves ``path`` as it was. Entries of an older ``path`` that the new folder
    does not bring are kept: they may be the user's. Raises DataError where ``path`` is, or lies in, a file.
    """
    path = path.absolute()
    require_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new, old = room / "new", room / "old"
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.replace(old)
        try:
            new.replace(path)
        except BaseException:
            if old.exists():
                old.replace(path)
            raise
        for entry in old.iterdir() if old.exists() else ():
            if not (path / entry.name).exists():
                entry.replace(path / entry.name)
    finally:
        shutil.rmtree(room)


def _ordinary(mode: int) -> int:
    """The mode that an ordinary new file gets here (``mkstemp`` gives one that only its owner reads)."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
