"""Text files, read with the tokenizer of the model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.datasets.splits import parts, require_classes
from secateur.errors import DataError, MissingExtra
from secateur.tasks import LanguageModel, TextClassification

LONGEST = 512
"""Tokens of a sequence at most; fewer where the tokenizer says that the model takes fewer."""


def plain_text(path: Path, model: str = "") -> LanguageModel:
    """A text as sequences of 512 tokens, or of fewer: 60 % to train on, then 20 % to choose by, then 20 % to test.

    Tokens are those of the model's own tokenizer where ``model`` is ``hf:…``, without special ones; else the bytes
    of its UTF-8, 0 to 255. Raises DataError where the file is missing, no UTF-8 or too short for three splits.
    """
    text = _read(path)
    if model.startswith("hf:"):
        tokenizer = _tokenizer(model)
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        length = min(LONGEST, tokenizer.model_max_length)
    else:
        tokens, length = torch.tensor(list(text.encode()), dtype=torch.long), LONGEST
    length = min(length, len(tokens) // 10)  # a short text is cut into ten
    if length < 2:
        raise DataError(f"{path} has {len(tokens)} tokens, too few to split into training, validation and test data")
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    found: dict[str, Any] = {
        name: [sequences[i] for i in rows.tolist()] for name, rows in parts(len(sequences), shuffled=False).items()
    }
    return LanguageModel(**found)


def labelled_texts(path: Path, model: str = "") -> TextClassification:
    """Lines of ``text<TAB>label``, split here; read with the tokenizer of an ``hf:…`` model.

    Labels are class indices, or names: then the model's configuration says which index each has, and where it does not
    know them they are numbered in their order. A first line whose label is "label" is left out, as are empty lines.
    Raises DataError for another model, a line without a tab, and a split of one class only.
    """
    if not model.startswith("hf:"):
        raise DataError(
            f"{path} is text, which only the tokenizer of a model hf:… can read here; "
            "give such a model, or your own task as module:function"
        )
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        text, tab, label = line.rpartition("\t")
        if line.strip() and not (tab and label.strip()):
            raise DataError(f"{path}, line {number}: expected text<TAB>label, found {line[:40]!r}")
        if line.strip() and not (number == 1 and label.strip() == "label"):
            rows.append((text, label.strip()))
    if not rows:
        raise DataError(f"{path} has no lines of text<TAB>label")
    tokenizer = _tokenizer(model)
    length = min(LONGEST, tokenizer.model_max_length)
    coded = tokenizer([text for text, _ in rows], truncation=True, max_length=length, verbose=False)["input_ids"]
    labels = _indices([label for _, label in rows], model)
    found: dict[str, Any] = {
        name: ([torch.tensor(coded[i]) for i in chosen.tolist()], labels[chosen])
        for name, chosen in parts(len(rows)).items()
    }
    for split, (_, classes) in found.items():
        require_classes(classes, split, path)
    return TextClassification(**found, pad=tokenizer.pad_token_id or 0)


def _indices(labels: list[str], model: str) -> Tensor:
    """The class index of every label."""
    if all(label.isdecimal() for label in labels):
        return torch.tensor([int(label) for label in labels])
    known = _transformers().AutoConfig.from_pretrained(model.removeprefix("hf:")).label2id
    if not set(labels) <= set(known):
        known = {label: i for i, label in enumerate(sorted(set(labels)))}
    return torch.tensor([known[label] for label in labels])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error


def _tokenizer(model: str) -> Any:
    """The tokenizer of an ``hf:…`` model. Raises DataError where there is none, MissingExtra without transformers."""
    name = model.removeprefix("hf:")
    try:
        return _transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{model} has no tokenizer to read the text with: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "reading text") from error
    return transformers
