"""The names at the top, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import secateur

NAMES = """
    Classification Plan PruneError Report analyze export keep_zeros load lower mask mask_ measure plan prune
    recalibrate_ recover save shrink shrink_
""".split()  # noqa: SIM905

SHARED = ("measure", "plan", "recover")
"""Public functions that share their name with the module they live near."""


def python(code: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_names_are_exactly_these() -> None:
    assert sorted(secateur.__all__) == sorted(NAMES)
    assert dir(secateur) == sorted([*NAMES, "__version__"])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(secateur, name)
    assert callable(value)
    assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'secateur' has no attribute 'Pruner'"):
        _ = secateur.Pruner


def test_import_loads_no_torch() -> None:
    python("import sys, secateur; secateur.__version__; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = """
import sys
from secateur.cli import app
try:
    app(prog_name="secateur")
except SystemExit as exit:
    assert not exit.code, exit.code
assert "torch" not in sys.modules
"""
    assert "Usage" in python(code, *arguments)


@pytest.mark.parametrize("name", SHARED)
def test_a_function_stays_in_front_of_the_module_of_its_name(name: str) -> None:
    check = f"import inspect; assert inspect.isfunction(secateur.{name}), secateur.{name}"
    python(f"import secateur; secateur.{name}; import secateur.{name}; {check}")
    python(f"import secateur, secateur.{name}; {check}")
    python(f"import secateur; from secateur.{name} import *; {check}")
    python(f"from secateur import {name}; import secateur; {check}; assert {name} is secateur.{name}")
