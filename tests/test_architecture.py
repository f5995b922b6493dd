"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "secateur"

# A room may import from the rooms before it, and from itself. See docs/decisions/0001-room-order.md.
ROOMS = """
    errors names files recipe progress tasks graph patterns budget stats criteria allocate plan planning apply
    sensitivity depth solvers recover train search measure runtime targets report store road promise compat datasets
    opening api training demo cli testing
""".split()  # noqa: SIM905

MODULES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in MODULES]


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The rooms that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "secateur":
            found |= {f"secateur.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.split(".")[1] for name in found if name.startswith("secateur.")}


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_up_the_list_of_rooms(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return
    here = room(path)
    assert here in ROOMS, f"{here} is no room; add it to the list, and say why in docs/decisions"
    below = ROOMS[ROOMS.index(here) + 1 :]
    assert not imports(path) & set(below)


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} is {length} lines long"


def test_the_top_and_the_command_line_do_not_import_torch_when_read() -> None:
    for name in ("__init__", "cli", "errors", "files"):
        tree = ast.parse((SOURCE / f"{name}.py").read_text())
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {module for module in top if module.split(".")[0] == "torch"}


OPTIONAL = {
    "accelerate", "altair", "lightning", "mlflow", "onnx", "onnxruntime", "onnxscript", "PIL", "sklearn", "tensorboard",
    "timm", "torchvision", "transformers", "vl_convert",
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_optional_packages_are_imported_where_they_are_needed(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & OPTIONAL


# Assembled so that this file does not find itself.
FORBIDDEN = re.compile(
    "|".join([r"\b(TO" r"DO|FIX" r"ME|X{3}|HA" r"CK)\b", r"(?<![\w.])/(t" r"mp|wo" r"rk|ro" r"ot|ho" r"me)/"])
)
KINDS = ["*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "docs/**/*.md"]
KINDS += [f"{folder}/**/*.py" for folder in ("src", "tests", "benchmarks", "examples")]
TEXTS = sorted(path for kind in KINDS for path in ROOT.glob(kind) if path.is_file())


@pytest.mark.parametrize("path", TEXTS, ids=[str(path.relative_to(ROOT)) for path in TEXTS])
def test_no_leftovers_and_no_paths_of_one_machine(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if FORBIDDEN.search(line)]
    assert not found
