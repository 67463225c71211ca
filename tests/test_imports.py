"""Imports run downwards only: launch -> pretrain.config, pretrain.events; pretrain -> the shard contract; data_tools -> nothing of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"data_tools.errors", "data_tools.files"}
# The demo splits the user's table, and so reads its rows. Tars without a manifest are indexed when they are first opened.
# Scoring runs a model: the one way up, and a lazy one.
ALLOWED = {
    "data_tools": {"data_tools"},
    "data_tools/score.py": {"data_tools", "pretrain.score"},
    "launch": {"launch", "pretrain.config", "pretrain.events", *GROUND},
    "pretrain": {"pretrain", "data_tools.shards", *GROUND},
    "pretrain/data/sources.py": {"pretrain", "data_tools.shards", "data_tools.index", *GROUND},
    "pretrain/demo.py": {"pretrain", "data_tools.sources", *GROUND},
}
LOWER = ["pretrain.model", "pretrain.losses", "pretrain.data", "pretrain.metrics"]
UPPER = [
    "pretrain.train",
    "pretrain.engine",
    "pretrain.checkpoint",
    "pretrain.evaluate",
    "pretrain.export",
    "pretrain.score",
]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, `from a import b` counted as `a` (or `a.b` where that is a module)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                names.add(full if is_module else node.module)
    return names


def within(name: str, packages: set[str] | list[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


FILES = [path for package in ("data_tools", "launch", "pretrain") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    allowed = ALLOWED.get(relative, ALLOWED[relative.split("/")[0]])
    ours = {name for name in imported(path) if within(name, ["data_tools", "launch", "pretrain"])}
    # `from pretrain import checkpoint` and `__version__` are imports of the package itself
    assert not {name for name in ours if not within(name, allowed)}
    module = relative.removesuffix(".py").replace("/", ".")
    if within(module, LOWER):
        assert not {name for name in ours if within(name, UPPER)}
    if relative.startswith(("data_tools/", "launch/")) or relative in ("pretrain/config.py", "pretrain/events.py"):
        assert not within("torch", list(imported(path)))
