"""Mutation tests: change one operator, comparison, number or statement at a time, and see whether the tests notice.

    python benchmarks/mutation.py                                  # loss, order of images, label propagation
    python benchmarks/mutation.py propagation/graph --share 0.2    # a fifth of that file's mutants, drawn with --seed
    python benchmarks/mutation.py losses/mutual_information --only 12 40

Each mutant runs the tests of its own file, in a process forked once the libraries are imported. Messages, annotations and doc
strings are not mutated. A mutant that takes many times the tests' time is killed by them too.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: File of muscle_plugin -> the tests that are its own.
TESTS = {
    "losses/mutual_information": ["tests/test_mutual_information.py"],
    "data/sampler": [
        "tests/test_data.py",
        "-k",
        "every_index or parts_of or disjoint_images or seed_and_step or stream_of",
    ],
    "propagation/graph": ["tests/test_propagation.py"],
    "propagation/diffusion": ["tests/test_propagation.py"],
    "propagation/estimator": ["tests/test_propagation.py", "-k", "estimator"],
}
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """Nodes that may be mutated, each with its statement."""

    def visit(node: ast.AST, statement: ast.stmt | None) -> Iterator[tuple[ast.AST, ast.stmt]]:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.ImportFrom, ast.Import)):
            return
        if isinstance(node, ast.stmt):
            statement = node
        if statement is not None:
            yield node, statement
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, statement)

    return visit(tree, None)


def can_change(node: ast.AST) -> bool:
    """Whether ``mutate`` knows a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        return type(node.op) in SWAPS
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in SWAPS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, (ast.Not, ast.USub))
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int, float))
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.If, ast.IfExp, ast.While))


def mutate(node: ast.AST) -> None:
    """Change a node in place."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub):
            node.op = ast.UAdd()
        else:
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        node.test = ast.Constant(False)
    elif isinstance(node, ast.Expr):
        node.value = ast.Constant(None)


def mutants(source: str) -> list[tuple[int, str, str, ast.Module]]:
    """Line, statement before, statement after, and tree of every mutant."""
    tree, found = ast.parse(source), []
    for number, (node, statement) in enumerate(places(tree)):
        if not can_change(node):
            continue
        other = copy.deepcopy(tree)
        changed, its_statement = next(pair for i, pair in enumerate(places(other)) if i == number)
        mutate(changed)
        ast.fix_missing_locations(other)
        before, after = (ast.unparse(s).splitlines() for s in (statement, its_statement))
        line = next((pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]), (before[0], after[0]))
        found.append((statement.lineno, line[0].strip(), line[1].strip(), other))
    return found


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree."""

    def __init__(self, name: str, tree: ast.Module, path: Path) -> None:
        self.name, self.tree, self.path = name, tree, path

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def survives(file: str, tree: ast.Module, seconds: int) -> tuple[bool, float]:
    """Whether the tests pass, and their CPU seconds."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        import pytest

        path = ROOT / "muscle_plugin" / f"{file}.py"
        sys.meta_path.insert(0, Mutated("muscle_plugin." + file.replace("/", "."), tree, path))
        common = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:timeout", "--hypothesis-seed", "0"]
        os._exit(int(pytest.main([*TESTS[file], *common])))
    _, status, usage = os.wait4(child, 0)
    return status == 0, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="mutants by number")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in ("torch", "sklearn.datasets", "scipy.sparse.linalg", "hypothesis", "pytest", "faiss"):
        __import__(name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for file in options.files or TESTS:
        source = (ROOT / "muscle_plugin" / f"{file}.py").read_text(encoding="utf-8")
        passed, baseline = survives(file, ast.parse(source), 600)
        if not passed:
            sys.exit(f"error: {file}: its tests fail as it is")
        everything = list(enumerate(mutants(source)))
        chosen = [m for m in everything if options.only is None or m[0] in options.only]
        chosen = sorted(
            random.Random(options.seed).sample(chosen, round(len(chosen) * options.share)), key=lambda m: m[0]
        )
        start, left = time.perf_counter(), []
        for number, (line, before, after, tree) in chosen:
            if survives(file, tree, round(5 * baseline + 10))[0]:
                left.append(number)
                print(f"  {number:4d} {file}.py:{line}: {before}  ->  {after}", flush=True)
        took = time.perf_counter() - start
        print(
            f"{file}: {len(chosen)} of {len(everything)} mutants, {len(chosen) - len(left)} killed, {len(left)} survive"
            f" ({baseline:.1f} s of tests each, {took:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
