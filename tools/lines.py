"""Print the lines of each module and class: `python -m tools.lines COMMIT` compares a commit with the working tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "d2v_fast"
MODULE = ""  # stands for the whole module among the names of its classes


def count(source: str) -> dict[str, int]:
    """Lines of a module and of each class in it, with docstrings, comments and decorators."""
    found = {MODULE: len(source.splitlines())}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = (node.end_lineno or first) - first + 1
    return found


def in_tree(root: Path = ROOT) -> dict[str, str]:
    """The modules of the working tree by their path in the package."""
    package = root / PACKAGE
    return {file.relative_to(package).as_posix(): file.read_text(encoding="utf-8") for file in package.rglob("*.py")}


def at(commit: str, root: Path = ROOT) -> dict[str, str]:
    """The same at a commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout

    names = git("ls-tree", "-r", "--name-only", commit, f"{PACKAGE}/").splitlines()
    return {name.removeprefix(f"{PACKAGE}/"): git("show", f"{commit}:./{name}") for name in names if name.endswith(".py")}


def table(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """One line for each module and, indented, for each of its classes; a dash where there is none."""
    counts = [{module: count(source) for module, source in sources.items()} for sources in (before, after)]
    rows = [("", "before", "after")]
    for module in sorted({*before, *after}):
        old, new = (found.get(module, {}) for found in counts)
        for name in {**new, **old}:
            rows.append((f"  {name}" if name else module, *(str(found.get(name, "-")) for found in (old, new))))
    rows.append(("total", *(str(sum(module[MODULE] for module in found.values())) for found in counts)))
    return "\n".join(f"{name:45}{old:>8}{new:>8}" for name, old, new in rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.lines COMMIT")
    try:
        print(table(at(sys.argv[1]), in_tree()))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # git has said why
