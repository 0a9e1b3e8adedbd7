"""The algorithms that can be trained. USB's are read from its source without importing it.

Importing ``semilearn`` takes over six seconds, too long for a command line that prints help or refuses a setting. Names,
views and settings of USB's algorithms are therefore taken from the syntax tree of the installed package: the decorator
``@ALGORITHMS.register("name")`` (or ``ALGORITHMS["name"] = Class``), the parameters of ``train_step`` and the literals of
``get_argument``. A test compares the result with the live registry.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from muscle_plugin.errors import CatalogueError
from muscle_plugin.registry.own import OWN_ALGORITHMS, Algorithm, Argument

MUSCLE = "muscle"
MUSCLE_PREFIX = "muscle_"
#: The USB class under plain ``muscle``: its step is cross-entropy on labelled images and nothing else.
MUSCLE_BASE = "fullysupervised"
#: A base must forward (or at least receive) this view for ``muscle_<base>`` to exist.
WEAK_UNLABELLED_VIEW = "x_ulb_w"
#: The MUSCLE that this package's patches add to USB itself: hosted like any algorithm of USB, but there is nothing to add.
HAVE_MUSCLE = ("musclefixmatch",)
#: Algorithms of USB (git main) that are not hosted, with the reason.
NOT_HOSTED = {"multimatch": "multimatch trains nets of several heads, which USB has for text alone"}

#: What plugins have registered (see :mod:`muscle_plugin.registry.extension`), by name.
PLUGIN_ALGORITHMS: dict[str, Algorithm] = {}


_TYPES = {"int": int, "float": float, "str": str, "str2bool": bool}


def _usb_root() -> Path:
    spec = find_spec("semilearn")
    if spec is None or not spec.submodule_search_locations:
        raise CatalogueError("semilearn (USB) is not installed: pip install semilearn")
    return Path(next(iter(spec.submodule_search_locations)))


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:  # an expression such as 1 / 64
        return eval(compile(ast.Expression(_only_arithmetic(node)), "<default>", "eval"), {"__builtins__": {}})


def _only_arithmetic(node: ast.expr) -> ast.expr:
    allowed = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
    if not all(isinstance(n, allowed) for n in ast.walk(node)):
        raise CatalogueError(f"a default in USB's source is not arithmetic: {ast.dump(node)}")
    return node


def _arguments(function: ast.FunctionDef) -> tuple[Argument, ...]:
    found = []
    for call in ast.walk(function):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "SSL_Argument"):
            continue
        name, kind, default = call.args[:3]
        texts = [_literal(a) for a in call.args[3:4]] + [_literal(k.value) for k in call.keywords if k.arg == "help"]
        found.append(
            Argument(
                _literal(name).lstrip("-"), _TYPES[getattr(kind, "id", "str")], _literal(default), "".join(texts[:1])
            )
        )
    return tuple(found)


def _registered_names(tree: ast.Module) -> dict[str, str]:
    """Registered name -> class name, from decorators and from ``ALGORITHMS['name'] = Class``."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for d in node.decorator_list:
                if isinstance(d, ast.Call) and ast.unparse(d.func) == "ALGORITHMS.register":
                    names[_literal(d.args[0])] = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
            if ast.unparse(target.value) == "ALGORITHMS" and isinstance(node.value, ast.Name):
                names[_literal(target.slice)] = node.value.id
    return names


@lru_cache(maxsize=1)
def usb_algorithms() -> dict[str, Algorithm]:
    """Every algorithm that the installed USB registers, by name; without those of ``NOT_HOSTED``.

    Raises:
        CatalogueError: USB is not installed.
    """
    classes: dict[str, ast.ClassDef] = {}
    names: dict[str, str] = {}
    for path in sorted((_usb_root() / "algorithms").glob("*/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes |= {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        names |= _registered_names(tree)

    def method(class_name: str, name: str) -> ast.FunctionDef | None:
        node = classes.get(class_name)
        if node is None:
            return None
        own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name]
        inherited = [method(getattr(b, "id", ""), name) for b in node.bases]
        return own[0] if own else next((m for m in inherited if m), None)

    catalogue = {}
    for name, class_name in names.items():
        if name in NOT_HOSTED:
            continue
        step, arguments = method(class_name, "train_step"), method(class_name, "get_argument")
        views = tuple(a.arg for a in step.args.args if a.arg != "self") if step else ()
        catalogue[name] = Algorithm(name, class_name, views, _arguments(arguments) if arguments else ())
    return dict(sorted(catalogue.items()))


def base_algorithms() -> dict[str, Algorithm]:
    """USB's algorithms, this package's own and those of plugins, by name, before MUSCLE is added to them.

    Raises:
        CatalogueError: USB is not installed.
    """
    return usb_algorithms() | OWN_ALGORITHMS | PLUGIN_ALGORITHMS


def muscle_algorithms() -> dict[str, Algorithm]:
    """Every MUSCLE composition by name: ``muscle``, and ``muscle_<name>`` for each algorithm with a weak view of
    unlabelled images that has no MUSCLE of its own. The value is the entry of its base.
    """
    composed = {MUSCLE: usb_algorithms()[MUSCLE_BASE]}
    bases = {n: a for n, a in base_algorithms().items() if n not in HAVE_MUSCLE}
    return composed | {MUSCLE_PREFIX + n: a for n, a in bases.items() if WEAK_UNLABELLED_VIEW in a.views}


def all_algorithms() -> dict[str, Algorithm]:
    """Every algorithm that can be trained, by name."""
    return base_algorithms() | muscle_algorithms()
