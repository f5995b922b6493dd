"""Tasks from words: the embedded digits, images, arrays, texts, the user's own functions."""

from __future__ import annotations

from pathlib import Path

from secateur.datasets.arrays import archive, digits
from secateur.datasets.images import ImageFolder, image_folder
from secateur.datasets.texts import labelled_texts, plain_text
from secateur.errors import DataError
from secateur.recipe import guarded, load_callable
from secateur.tasks import Task

__all__ = ["ImageFolder", "archive", "digits", "image_folder", "labelled_texts", "load", "plain_text"]

FORMS = (
    "digits, a folder of class folders of images, an .npz file, a .txt file, a .tsv file of text<TAB>label, "
    "package.module:function, ./file.py:function"
)


def load(spec: str, input_size: int | None = None, model: str = "") -> Task:
    """The task that ``spec`` names: one of the ``FORMS``.

    input_size: the height and width that images of a folder are brought to (224 by default).
    model: the words that name the model, whose tokenizer texts are read with where they are ``hf:…``.
    A function is called without arguments and gives a Task. Raises DataError for a missing or
    unusable path, SpecError for a function that cannot be found, or fails.
    """
    path = Path(spec)
    if spec == "digits":
        return digits()
    if path.is_dir():
        return image_folder(path, input_size or 224)
    if path.suffix == ".npz":
        return archive(path)
    if path.suffix == ".txt":
        return plain_text(path, model)
    if path.suffix == ".tsv":
        return labelled_texts(path, model)
    if ":" not in spec:
        raise DataError(f"there is no data {spec!r}; expected {FORMS}")
    task = guarded(spec, load_callable(spec))
    if not all(callable(getattr(task, name, None)) for name in ("batches", "loss", "scores")):
        raise DataError(f"{spec} gave a {type(task).__name__}, expected a Task with batches, loss and scores")
    return task  # type: ignore[no-any-return]
