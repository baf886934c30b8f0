"""Mutants of a module, each of which a test should detect (`make mutants MODULE=ema.py TESTS=tests/test_ema.py`).

A mutant differs from the module in one operator, constant, condition or statement. Messages and annotations stay as
they are. The tests run in forks of a process that has imported torch and transformers, so a mutant takes seconds.
"""

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTED = [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "roberta", "beit", "vit", "wav2vec2", "hubert")]
IMPORTED += [f"transformers.models.data2vec.modeling_data2vec_{name}" for name in ("text", "audio", "vision")]
IMPORTED += ["accelerate", "datasets", "jsonargparse", "PIL.Image", "scipy.stats", "torch._dynamo"]
SWAPS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
SWAPS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Div), (ast.Mod, ast.Mult), (ast.Pow, ast.Mult)]
SWAPS += [(ast.BitAnd, ast.BitOr), (ast.And, ast.Or), (ast.LShift, ast.RShift)]
OTHER = {a: b for pair in SWAPS for a, b in (pair, pair[::-1])} | {ast.Div: ast.Mult, ast.Mult: ast.Div}


def changes(node):
    """Possible replacements of a node of the syntax tree."""
    match node:
        case ast.operator() | ast.boolop() | ast.cmpop() if type(node) in OTHER:
            return [OTHER[type(node)]()]
        case ast.UnaryOp(operand=operand):
            return [operand]
        case ast.Constant(value=bool(value)):
            return [ast.Constant(not value)]
        case ast.Constant(value=int(value) | float(value)):
            return [ast.Constant(value + 1)]
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            return [ast.Pass()]
        case ast.Return(value=ast.expr()):
            return [ast.Return(None)]
        case ast.If(test=test, body=body, orelse=orelse):
            return [ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)]
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return [ast.IfExp(test, orelse, body)]
    return []


def sites(node):
    """All (list or node, index or field, new child) of a syntax tree, without messages and annotations."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "exc", "decorator_list") or isinstance(node, ast.JoinedStr):
            continue
        children = enumerate(value) if isinstance(value, list) else [(field, value)]
        for place, child in children:
            if isinstance(child, ast.AST) and not ast.unparse(child).startswith("log."):
                yield from ((value if isinstance(value, list) else node, place, new) for new in changes(child))
                yield from sites(child)


def put(parent, place, child):
    """Replace a child; returns the old one."""
    old = parent[place] if isinstance(parent, list) else getattr(parent, place)
    parent.__setitem__(place, child) if isinstance(parent, list) else setattr(parent, place, child)
    return old


def failed(folder, tests, limit):
    """Whether a test fails in a fork of this process, or takes longer than `limit` seconds."""
    if (child := os.fork()) == 0:
        signal.alarm(limit)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.startswith(("d2v_fast", "tests"))]:
            del sys.modules[name]  # so that those in the folder are imported
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported", *tests])))
    return os.waitpid(child, 0)[1] != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="below d2v_fast, such as train/step.py")
    parser.add_argument("tests", nargs="+", help="arguments of pytest, such as tests/test_ema.py")
    parser.add_argument("--number", type=int, default=40, help="how many mutants to try; they are drawn with a fixed seed")
    args = parser.parse_args()
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    with tempfile.TemporaryDirectory() as folder:
        for part in ("d2v_fast", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
        os.environ["PYTHONPATH"] = folder
        for name in IMPORTED:
            importlib.import_module(name)
        file = Path(folder, "d2v_fast", args.module)
        tree, begin = ast.parse(file.read_text()), time.monotonic()
        assert not failed(folder, args.tests, 600), "the tests fail without a mutant"
        limit = int(30 + 5 * (time.monotonic() - begin))
        found = list(sites(tree))
        chosen = random.Random(0).sample(found, min(args.number, len(found)))
        survived = 0
        for parent, place, child in chosen:
            before = ast.unparse(tree).splitlines()
            old = put(parent, place, child)
            file.write_text(ast.unparse(ast.fix_missing_locations(tree)))
            if not failed(folder, args.tests, limit):
                survived += 1
                changed = next(pair for pair in zip(before, file.read_text().splitlines(), strict=False) if pair[0] != pair[1])
                print("survived:", "  ->  ".join(line.strip() for line in changed), flush=True)
            put(parent, place, old)
        print(f"{args.module}: {len(found)} possible, {len(chosen)} made, {len(chosen) - survived} killed, {survived} survived")


if __name__ == "__main__":
    main()
