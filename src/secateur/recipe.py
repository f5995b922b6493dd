"""From words to objects: models, functions and example inputs as the command line names them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MissingExtra, PruneError, SpecError

FORMS = "timm:NAME, torchvision:NAME, hf:PATH_OR_ID, package.module:factory, ./file.py:factory"
PUBLIC = ("timm:", "torchvision:", "hf:")
"""Sources that run no code of the user's; the only ones that a saved directory may name."""


def load_model(spec: str) -> nn.Module:
    """The dense model that ``spec`` names, in evaluation mode: one of the ``FORMS``.

    timm and torchvision give their pretrained weights; hf the class that the configuration names, from
    safetensors, without remote code; a factory is called without arguments.

    Raises SpecError where the words cannot be read, or what they name does not give an ``nn.Module``;
    MissingExtra where the package that they name is not installed.
    """
    kind, colon, name = spec.partition(":")
    if not colon:
        raise SpecError(f"model {spec!r} is none of {FORMS}, nor a directory that `secateur prune` wrote")
    model = guarded(spec, partial(_SOURCES[kind], name) if kind in _SOURCES else load_callable(spec))
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def load_callable(spec: str) -> Callable[..., Any]:
    """The function or class of ``package.module:name`` or ``./file.py:name``.

    The current folder is searched too, and the file's own folder for what the file imports.
    Raises SpecError where there is no such file, module or name, or importing it fails.
    """
    where, colon, name = spec.rpartition(":")
    if not (colon and where and name):
        raise SpecError(f"{spec!r} names no function; expected package.module:name or ./file.py:name")
    module = _file(Path(where).resolve()) if where.endswith(".py") else _module(where)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        close = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]) or "none"
        raise SpecError(f"{where} has no function {name!r}; it has {close}")
    return found  # type: ignore[no-any-return]


def choose(wish: Any, known: Mapping[str, Any], what: str) -> Any:
    """The function that a wish means: one of ours by name, ``module:function``, or the function itself.

    what: the kind of thing, for messages. Raises SpecError for anything else.
    """
    if callable(wish):
        return wish
    if not isinstance(wish, str):
        raise SpecError(f"{what} is a name or a function, found {type(wish).__name__}")
    if wish in known:
        return known[wish]
    if ":" in wish:
        return load_callable(wish)
    raise SpecError(f"{what} {wish!r} is unknown; there are {', '.join(known)}, or give module:function")


def example_input(text: str) -> Tensor:
    """A random tensor (normal, fixed seed) of the shape written ``1x3x32x32``. Raises SpecError."""
    try:
        shape = [int(size) for size in text.split("x")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise SpecError(f"input shape {text!r} cannot be read; expected sizes joined by x, such as 1x3x224x224")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def guarded(spec: str, load: Callable[[], Any]) -> Any:
    """``load()``, its failures told as the user's: what they named does not work."""
    try:
        return load()
    except PruneError:
        raise
    except Exception as error:
        raise SpecError(f"{spec} could not be loaded: {type(error).__name__}: {error}") from error


@cache
def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpecError(f"there is no file {path}; expected ./file.py:name")
    _search(path.parent)
    name = f"{path.stem}_file"  # not the plain stem, which may be an installed package's name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    guarded(str(path), partial(spec.loader.exec_module, module))
    return module


def _module(name: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise SpecError(f"{name} could not be imported: {error}") from error
        raise SpecError(f"there is no module {name!r}; a file is named ./file.py:name") from error
    except PruneError:
        raise
    except Exception as error:
        raise SpecError(f"{name} could not be imported: {type(error).__name__}: {error}") from error


def _search(folder: Path) -> None:
    """Let imports find the folder's modules, after all installed ones."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _timm(name: str) -> nn.Module:
    timm = _package("timm", "timm", "a timm model")
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}; {_close(name, timm.list_models())}")
    return timm.create_model(name, pretrained=True)  # type: ignore[no-any-return]


def _torchvision(name: str) -> nn.Module:
    models = _package("torchvision.models", "vision", "a torchvision model")
    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}; {_close(name, models.list_models())}")
    return models.get_model(name, weights="DEFAULT")  # type: ignore[no-any-return]


def _hf(name: str) -> nn.Module:
    transformers = _package("transformers", "hf", "a Hugging Face model")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = (config.architectures or ["AutoModel"])[0]
    if not hasattr(transformers, kind):
        raise SpecError(f"hf:{name} is a {kind}, which transformers does not have; remote code is not run")
    model: nn.Module = getattr(transformers, kind).from_pretrained(name, use_safetensors=True)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]  # a cache among the outputs cannot be captured
    return model


_SOURCES: dict[str, Callable[[str], nn.Module]] = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}


def _package(name: str, extra: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(name.partition(".")[0], extra, purpose) from error


def _close(name: str, known: list[str]) -> str:
    return f"close names are {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or 'none'}"
