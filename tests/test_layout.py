"""The picture of imports: no arrow runs back.     pytest tests/test_layout.py"""

import ast
import subprocess

import pytest
from conftest import ROOT

TRACKED = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
MODULES = {path.removesuffix(".py").replace("/", ".") for path in TRACKED}
MAY = {  # what the files of a folder import; "" is the root
    "": {"", "engine", "standin"},
    "engine": {"engine", "settings"},
    "algorithms": {"", "algorithms", "standin"},
    "worlds": {"envs", "engine", "worlds"},
}


def folder(name):
    """Where a module is: a folder, or "" for the root."""
    return name.rpartition(".")[0].partition(".")[0]


def imports(path):
    """Modules of ours that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from {*names} & MODULES


def test_matplotlib_is_imported_only_where_something_is_drawn():
    for path in TRACKED:
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "matplotlib" not in ast.unparse(node), path


@pytest.mark.parametrize("place", MAY)
def test_no_arrow_runs_back(place):
    files = [
        path for path in TRACKED if folder(path.removesuffix(".py").replace("/", ".")) == place
    ]
    arrows = [(path, name) for path in files for name in imports(path)]
    assert arrows
    wrong = [arrow for arrow in arrows if not {arrow[1], folder(arrow[1])} & MAY[place]]
    assert not wrong
