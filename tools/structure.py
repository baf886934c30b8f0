"""Draw the structure of the package from its imports: `python -m tools.structure` writes docs/structure.svg.

A box is a module or a folder of modules, drawn above everything that it imports when it is loaded. Imports inside functions
run only in some cases and are not drawn. An arrow implied by others (a imports b, b imports c, a imports c) is left out.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d2v_fast"
PICTURE = ROOT / "docs" / "structure.svg"

WIDTH, HEIGHT, GAP, LEVEL = 112, 40, 16, 92  # of a box, between boxes, from one layer to the next


def loaded(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is loaded: all those outside functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from loaded(child)


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each box, the boxes that it imports. A command in a folder, such as `encoders.table`, is a separate box."""
    trees = {}
    for file in sorted(package.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        parts = file.relative_to(package).with_suffix("").parts
        box = ".".join(parts) if 'if __name__ == "__main__":' in source else parts[0]
        if box != "__init__":
            trees.setdefault(box, []).append(ast.parse(source))
    graph: dict[str, set[str]] = {box: set() for box in trees}
    for box, modules in trees.items():
        for node in (node for tree in modules for node in loaded(tree)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for parts in (name.split(".") for name in names):
                if parts[0] == package.name and len(parts) > 1:
                    graph[box] |= {parts[1]} & graph.keys() - {box}
    return graph


def layers(graph: dict[str, set[str]]) -> dict[str, int]:
    """The layer of each box, 0 at the bottom; boxes that nothing imports are at the top. Raises CycleError on a cycle."""
    layer: dict[str, int] = {}
    for box in graphlib.TopologicalSorter(graph).static_order():
        layer[box] = 1 + max((layer[below] for below in graph[box]), default=-1)
    imported = set().union(*graph.values())
    top = max(layer.values())
    return {box: level if box in imported else top for box, level in layer.items()}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without arrows implied by others (transitive reduction)."""
    below: dict[str, set[str]] = {}
    for box in graphlib.TopologicalSorter(graph).static_order():
        below[box] = graph[box].union(*(below[other] for other in graph[box]))
    return {box: others - set().union(*(below[other] for other in others)) for box, others in graph.items()}


def paths(graph: dict[str, set[str]], layer: dict[str, int]) -> list[list[tuple[str, int]]]:
    """The points (name, layer) of each arrow: both boxes, and a gap to pass through in each layer between them."""
    arrows = [(above, below) for above in sorted(graph) for below in sorted(graph[above])]
    between = {(a, b): [(f"{a}>{b}", level) for level in range(layer[a] - 1, layer[b], -1)] for a, b in arrows}
    return [[(a, layer[a]), *between[a, b], (b, layer[b])] for a, b in arrows]


def order(points: set[tuple[str, int]], arrows: list[list[tuple[str, int]]]) -> list[list[str]]:
    """The names of each layer from left to right, each near the mean of its neighbours to reduce crossings."""
    rows = [sorted(name for name, level in points if level == row) for row in range(1 + max(level for _, level in points))]
    steps = [step for arrow in arrows for step in itertools.pairwise(arrow)]
    for down in [True, False] * 8:
        for row in range(len(rows) - 1, -1, -1) if down else range(len(rows)):
            place = {name: (i + 0.5) / len(names) for names in rows for i, name in enumerate(names)}
            near: dict[str, list[float]] = {name: [] for name in rows[row]}
            for upper, lower in steps:
                here, there = (lower, upper) if down else (upper, lower)
                if here[1] == row:
                    near[here[0]].append(place[there[0]])
            rows[row].sort(key=lambda name: (statistics.fmean(near[name]) if near[name] else place[name], name))
    return rows


def picture(graph: dict[str, set[str]]) -> str:
    """The structure as SVG."""
    layer = layers(graph)
    arrows = paths(reduced(graph), layer)
    rows = order({*layer.items(), *(point for arrow in arrows for point in arrow)}, arrows)
    width = {name: WIDTH if name in graph else 0 for names in rows for name in names}
    total = max(sum(width[name] + GAP for name in names) for names in rows) + GAP
    x, y = {}, {}
    for level, names in enumerate(rows):
        gap = (total - sum(width[name] for name in names)) / (len(names) + 1)
        left = gap
        for name in names:
            x[name, level], y[level] = left + width[name] / 2, GAP + (len(rows) - 1 - level) * LEVEL
            left += width[name] + gap
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {len(rows) * LEVEL - LEVEL + HEIGHT + 2 * GAP}" '
        'font-family="sans-serif" font-size="14">',
        "<title>The modules and folders of d2v_fast; an arrow points to what a module imports when it is loaded</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for arrow in arrows:
        route = []
        for name, level in arrow:
            top = y[level]
            ends = [top + HEIGHT] if name == arrow[0][0] else [top] if name == arrow[-1][0] else [top, top + HEIGHT]
            route += [f"{x[name, level]:.0f} {end}" for end in ends]
        path = "M" + " L".join(route)
        lines.append(f'<path d="{path}" fill="none" stroke="#777" stroke-linejoin="round" marker-end="url(#head)"/>')
    for name, level in sorted(layer.items()):
        left, top = x[name, level] - WIDTH / 2, y[level]
        fill = "#dbe9f6" if (PACKAGE / name).is_dir() else "#f4f4f4"
        lines.append(f'<rect x="{left:.0f}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="#555"/>')
        lines.append(f'<text x="{x[name, level]:.0f}" y="{top + 25}" text-anchor="middle">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(imports()), encoding="utf-8")
