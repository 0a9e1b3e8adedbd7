"""Mutation tests: change one operator, comparison, number or statement at a time, and see whether the tests notice.

    python benchmarks/mutation.py                                  # loss, order of images, label propagation
    python benchmarks/mutation.py propagation/graph --share 0.2    # a fifth of that file's mutants, drawn with --seed
    python benchmarks/mutation.py losses --only 12 40 --verbose

First the file's own tests run once, and coverage.py notes which of them execute which lines. A mutant then runs those that
execute its statement, the quickest first, up to the first failure, in a process forked once the tests are collected; with
--thorough one that they let live is run against all other tests of the file, too. What is executed while the module is
imported concerns all tests. A statement that no test executes is "not covered": its mutants survive. Messages, annotations
and doc strings are not mutated. A mutant that takes many times the tests' time, or never ends, is killed by them too, and
counted apart.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parent.parent
#: File of muscle_plugin -> the tests that are its own.
TESTS = {
    "losses": ["tests/test_mutual_information.py"],
    "data/sampler": [
        "tests/test_data.py",
        "-k",
        "every_index or parts_of or disjoint_images or seed_and_step",
    ],
    "propagation/graph": ["tests/test_propagation.py"],
    "propagation/class_mass": ["tests/test_propagation.py"],
    "propagation/diffusion": ["tests/test_propagation.py"],
    "propagation/estimator": ["tests/test_estimator.py"],
}
#: What the tests import, or have imported by what they call (``torch.testing.assert_close`` takes 0.5 s the first time).
IMPORTED = (
    "torch", "torch.distributed.tensor", "sklearn.datasets", "sklearn.neighbors", "scipy.sparse.linalg", "hypothesis", "pytest",
    "faiss",
)  # fmt: skip
#: Options of pytest: of its plugins Hypothesis's alone, to begin sooner.
PYTEST = [
    "-o",
    "addopts=",
    "-x",
    "-q",
    "--tb=no",
    "-p",
    "no:cacheprovider",
    "-p",
    "_hypothesis_pytestplugin",
    "--hypothesis-seed",
    "0",
]
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


@dataclass(frozen=True)
class Mutant:
    """A changed file: lines of the statement, the line before and after, and the tree."""

    lines: range
    before: str
    after: str
    tree: ast.Module


def lines_of(statement: ast.stmt) -> range:
    """Lines of a statement, without those of the statements in it."""
    body = getattr(statement, "body", None)
    last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno
    return range(statement.lineno, last + 1)


def excerpts(before: str, after: str, most: int = 100, around: int = 40) -> tuple[str, str]:
    """Two lines of code; where they are long, what differs and some of what surrounds it."""
    if len(before) <= most:
        return before, after
    same = next(i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y)
    return tuple(f"... {x[max(0, same - around) : same + around]} ..." for x in (before, after))  # type: ignore[return-value]


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a file."""
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
        found.append(Mutant(lines_of(statement), *excerpts(line[0].strip(), line[1].strip()), other))
    return found


def install(name: str, tree: ast.Module, path: Path) -> None:
    """Execute a changed file in its module, and give what it defines to all that imported it from there."""
    module = sys.modules[name]
    before = dict(module.__dict__)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    changed = {n: (old, module.__dict__[n]) for n, old in before.items() if module.__dict__[n] is not old}
    for other in list(sys.modules.values()):
        for n, value in list(vars(other).items()) if isinstance(other, ModuleType) else ():
            if n in changed and value is changed[n][0]:
                setattr(other, n, changed[n][1])


@dataclass(frozen=True)
class Outcome:
    """How the tests of a process ended: exit status, or minus a signal; the first that failed; what else it has to say."""

    status: int
    failed: str
    said: dict[str, Any]


#: Exit status where the changed file cannot be executed.
NOT_IMPORTED = 9


class Session:
    """Pytest plugin: in place of running the tests, calls ``work(self)``, which runs some of them, each time in a fork."""

    def __init__(self, file: str, work: Callable[[Session], None]) -> None:
        self.path = ROOT / "muscle_plugin" / f"{file}.py"
        self._name, self._work = "muscle_plugin." + file.replace("/", "."), work
        self.items: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._failed = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {i.nodeid: i for i in session.items}
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self._failed:
            self._failed = report.nodeid

    def run(self, names: Sequence[str], tree: ast.Module | None, seconds: int, cover: bool = False) -> Outcome:
        """Run tests in this order, up to the first that fails, on the file as it is or as ``tree``, in a fork, for at most so
        many CPU seconds."""
        with tempfile.TemporaryFile() as note:
            child = os.fork()
            if child == 0:
                status = 70
                try:
                    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
                    signal.alarm(20 * seconds)  # one that waits for ever uses no CPU
                    status = self._run(names, tree, note, cover)
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.wait4(child, 0)[1])
            note.seek(0)
            said = pickle.loads(content) if (content := note.read()) else {}
        if status not in (0, 1, NOT_IMPORTED) and status >= 0:
            raise RuntimeError(f"{self.path}: a process ended with {status}: nothing can be said of this mutant")
        return Outcome(status, said.get("failed", ""), said)

    def _run(self, names: Sequence[str], tree: ast.Module | None, note: Any, cover: bool) -> int:
        watch = coverage.Coverage(data_file=None, include=[str(self.path)], config_file=False) if cover else None
        if watch is not None:  # the import once more, for the lines that it executes
            watch.start()
            tree = ast.parse(self.path.read_text(encoding="utf-8"))
        if tree is not None:
            try:
                install(self._name, tree, self.path)
            except Exception:
                return NOT_IMPORTED
        items = [self.items[n] for n in names]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if watch is not None:
                watch.switch_context(item.nodeid)
            start = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self._seconds[item.nodeid] = time.process_time() - start
            if self._failed:
                break
        said: dict[str, Any] = {"failed": self._failed, "seconds": self._seconds}
        if watch is not None:
            watch.stop()
            said["contexts"] = watch.get_data().contexts_by_lineno(str(self.path))
        note.write(pickle.dumps(said))
        note.flush()
        return int(bool(self._failed))


@dataclass(frozen=True)
class Baseline:
    """The tests on the file as it is: CPU seconds of each, lines that each executes, lines of the import."""

    seconds: dict[str, float]
    executed: dict[str, set[int]]
    at_import: set[int]

    @classmethod
    def of(cls, session: Session) -> Baseline:
        done = session.run(list(session.items), None, 600, cover=True)
        if done.status:
            raise RuntimeError(f"{session.path}: its tests fail as it is ({done.failed or done.status})")
        executed: dict[str, set[int]] = {}
        for line, contexts in done.said["contexts"].items():
            for context in contexts:
                executed.setdefault(context, set()).add(line)
        return cls(done.said["seconds"], executed, executed.pop("", set()))

    def tests_of(self, lines: range) -> list[str]:
        """Tests that execute one of the lines, the quickest first."""
        all_of_them = not self.at_import.isdisjoint(lines)
        names = [n for n in self.seconds if all_of_them or not self.executed.get(n, set()).isdisjoint(lines)]
        return sorted(names, key=self.seconds.__getitem__)

    def limit(self, names: Sequence[str]) -> int:
        """CPU seconds after which a mutant is taken not to end."""
        return round(5 * sum(self.seconds[n] for n in names) + 5)


def verdict(session: Session, mutant: Mutant, base: Baseline, thorough: bool) -> tuple[str, str]:
    """ "killed", "no end", "survives" or "not covered", and the test that killed it."""
    names = base.tests_of(mutant.lines)
    if not names:
        return "not covered", ""
    for chosen in (names, list(base.seconds))[: 2 if thorough and len(names) < len(base.seconds) else 1]:
        done = session.run(chosen, mutant.tree, base.limit(chosen))
        if done.status:
            ended = done.status < 0 and -done.status in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
            return "no end" if ended else "killed", done.failed or ("import" if done.status > 0 else "a crash")
    return "survives", ""


def run_file(file: str, options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Run the mutants of a file, telling of each."""
    source = (ROOT / "muscle_plugin" / f"{file}.py").read_text(encoding="utf-8")
    everything = list(enumerate(mutants(source)))
    drawn = [m for m in everything if options.only is None or m[0] in options.only]
    drawn = sorted(random.Random(options.seed).sample(drawn, round(len(drawn) * options.share)), key=lambda m: m[0])

    def work(session: Session) -> None:
        base = Baseline.of(session)
        start, counts = time.perf_counter(), dict.fromkeys(("killed", "no end", "survives", "not covered"), 0)
        for number, mutant in drawn:
            how, by = verdict(session, mutant, base, options.thorough)
            counts[how] += 1
            if options.verbose or how in ("survives", "not covered"):
                by = f"   by {by.rpartition('::')[2]}" if by else ""
                place = f"{file}.py:{mutant.lines.start}"
                say(f"  {number:4d} {how}: {place}: {mutant.before}  ->  {mutant.after}{by}")
        took = time.perf_counter() - start
        say(
            f"{file}: {len(drawn)} of {len(everything)} mutants: {counts['killed']} killed, {counts['no end']} without end,"
            f" {counts['survives']} survive, {counts['not covered']} not covered"
            f" ({len(base.seconds)} tests of {sum(base.seconds.values()):.1f} s, {took:.0f} s)"
        )

    pytest.main([*TESTS[file], *PYTEST], plugins=[Session(file, work)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="mutants by number")
    parser.add_argument("--thorough", action="store_true", help="run survivors against all tests of the file")
    parser.add_argument("--verbose", action="store_true", help="print those that are killed, too, and by which test")
    options = parser.parse_args()
    unknown = [f for f in options.files if f not in TESTS]
    if unknown:
        parser.error(f"{unknown[0]}: expected one of {', '.join(TESTS)}")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in IMPORTED:
        __import__(name)
    import hypothesis

    # what one mutant fails on is not kept for the next, and not made smaller
    phases = [p for p in hypothesis.Phase if p not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)]
    hypothesis.settings.register_profile("mutation", database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for file in options.files or TESTS:
        child = os.fork()  # each file in a process of its own, which has imported nothing of this package
        if child == 0:
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            try:
                run_file(file, options, lambda line: print(line, file=out, flush=True))
            except BaseException as e:
                print(f"error: {file}: {e!r}", file=out, flush=True)
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main()
