"""The algorithms that can be trained, by name, with their settings and views. USB's are read without importing it.

Importing ``semilearn`` takes over six seconds, too long for a command line that prints help or refuses a setting. Names,
views and settings of USB's algorithms are therefore taken from the syntax tree of the installed package: the decorator
``@ALGORITHMS.register("name")`` (or ``ALGORITHMS["name"] = Class``), the parameters of ``train_step`` and the literals of
``get_argument``. A test compares the result with the live registry. The classes of this package's own are in ``algorithms/``.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from muscle_plugin.errors import ConfigError

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


#: What a number means, as bounds for pydantic's ``Field``.
Bounds = tuple[tuple[str, Any], ...]
SHARE: Bounds = (("ge", 0), ("le", 1))  # a probability, a part of the run
MOMENTUM: Bounds = (("ge", 0), ("lt", 1))
WEIGHT: Bounds = (("ge", 0),)  # a size or a number of steps that may be 0, too
POSITIVE: Bounds = (("gt", 0),)  # a temperature, a divisor
COUNT: Bounds = (("ge", 1), ("le", 2**31))
#: Bounds of the settings of USB's algorithms, of 0.3.2 and git main, by name; of one algorithm by ``ALGORITHM.NAME``.
USB_BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(("p_cutoff", "contrast_p_cutoff", "smoothing_alpha"), SHARE),
    "ema_p": MOMENTUM,
    **dict.fromkeys(("T", "C"), POSITIVE),
    **dict.fromkeys(("K", "da_len", "proj_size", "queue_batch", "num_wu_eval_iter", "n_sigma"), COUNT),
    **dict.fromkeys(("mixup_alpha", "num_wu_iter", "rho_min", "vat_eps"), WEIGHT),
    "gamma": (("ge", 1),),  # the threshold of dash falls
    "unsup_warm_up": (("gt", 0), ("le", 1)),  # USB divides by it
    "meanteacher.unsup_warm_up": SHARE,
    "tsa_schedule": (("pattern", "^(none|linear|log|exp)$"),),
}


@dataclass(frozen=True)
class Argument:
    """One setting that an algorithm adds, as in USB's ``SSL_Argument``, with the values that it may have."""

    name: str
    type: type
    default: Any
    help: str = ""
    bounds: Bounds = ()


@dataclass(frozen=True)
class Algorithm:
    """One entry of a registry: its class, the parameters of its ``train_step`` and its settings."""

    name: str
    class_name: str
    views: tuple[str, ...]
    arguments: tuple[Argument, ...]


_MEAN_TEACHER = (
    Argument("consistency", float, 100.0, "weight of the consistency loss; its authors take 100", WEIGHT),
    Argument("consistency_rampup", int, 5, "epochs over which that weight rises", WEIGHT),
    Argument("logit_distance", float, 0.01, "weight that ties the two heads of a net that has two", WEIGHT),
)
_LABEL_PROPAGATION = (
    Argument("lp_start", float, 0.5, "share of the epochs that is stage 1, without pseudo-labels", SHARE),
    Argument(
        "lp_method", str, "diffusion", "diffusion, or poisson_mbo: slower, classes of fixed sizes",
        (("pattern", "^(diffusion|poisson_mbo)$"),),
    ),
    Argument(
        "lp_class_mass", str, "uniform", "uniform: hubs take no pseudo-labels from other classes; equal, labels or a number"
        " for each class, as 5,3,2: these shares of the pseudo-labels (equal; the labels'; as given); none: the paper's",
        (("min_length", 1),),
    ),
    Argument("lp_k", int, 50, "nearest neighbours in the graph; 0: 2 ln n of n images", (("ge", 0), ("le", 2**31))),
    Argument(
        "lp_affinity", str, "cosine", "cosine, or local_scaling of the distances",
        (("pattern", "^(cosine|local_scaling)$"),),
    ),
    Argument("lp_gamma", float, 3.0, "of lp_affinity cosine: its power", POSITIVE),
    Argument("lp_alpha", float, 0.99, "strength of the diffusion", (("gt", 0), ("lt", 1))),
    Argument("lp_max_iter", int, 20, "iterations of conjugate gradients", COUNT),
    Argument("lp_tol", float, 1e-6, "relative residual at which they end", WEIGHT),
)  # fmt: skip
_CONTRASTIVE = (
    Argument("contrastive_weight", float, 1.0, "weight of the contrastive loss", WEIGHT),
    Argument("temperature", float, 0.5, "temperature of NT-Xent", POSITIVE),
)
_TWO_WEAK_VIEWS = ("x_lb", "y_lb", "x_lb_w2", "x_ulb_w", "x_ulb_w2")

OWN_ALGORITHMS: dict[str, Algorithm] = {
    a.name: a
    for a in (
        Algorithm("meanteacher_original", "OriginalMeanTeacher", _TWO_WEAK_VIEWS, _MEAN_TEACHER),
        Algorithm("labelprop", "LabelPropagation", ("x_lb", "y_lb", "x_ulb_w", "idx_ulb"), _LABEL_PROPAGATION),
        Algorithm(
            "meanteacher_labelprop", "MeanTeacherLabelPropagation", (*_TWO_WEAK_VIEWS, "idx_ulb"),
            (*_LABEL_PROPAGATION, *_MEAN_TEACHER),
        ),
        Algorithm("linear_probe", "LinearProbe", ("y_lb",), ()),
        Algorithm("class_mean", "ClassMean", ("y_lb",), ()),
        Algorithm("contrastive", "Contrastive", ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s"), _CONTRASTIVE),
    )
}  # fmt: skip

#: Algorithms that fit a linear head on frozen features in one step.
FITTED = frozenset(["class_mean", "linear_probe"])

#: What plugins have registered (see :mod:`muscle_plugin.registry.plugins`), by name.
PLUGIN_ALGORITHMS: dict[str, Algorithm] = {}


def stage_1_epochs(lp_start: float, epochs: int) -> int:
    """Whole epochs of label propagation's first stage."""
    return round(lp_start * epochs)


def class_mass(lp_class_mass: str) -> str | list[float]:
    """The setting as label propagation takes it: a word, or the (C,) shares. ValueError where it is neither."""
    words = ("none", "uniform", "equal", "labels")
    return lp_class_mass if lp_class_mass in words else [float(x) for x in lp_class_mass.split(",")]


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:  # an expression such as 1 / 64
        allowed = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
        if not all(isinstance(n, allowed) for n in ast.walk(node)):
            raise ConfigError([f"a default in USB's source is not arithmetic: {ast.dump(node)}"]) from None
        return eval(compile(ast.Expression(node), "<default>", "eval"), {"__builtins__": {}})


def _arguments(algorithm: str, function: ast.FunctionDef) -> tuple[Argument, ...]:
    types = {"int": int, "float": float, "str": str, "str2bool": bool}
    found = []
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "SSL_Argument":
            name, kind, default = call.args[:3]
            texts = [*call.args[3:4], *(k.value for k in call.keywords if k.arg == "help")]
            text = _literal(texts[0]) if texts else ""
            wanted = types[getattr(kind, "id", "str")]
            key = _literal(name).lstrip("-")
            usual = WEIGHT if key.endswith("_loss_ratio") else ()
            bounds = USB_BOUNDS.get(f"{algorithm}.{key}") or USB_BOUNDS.get(key, usual)
            found.append(Argument(key, wanted, _literal(default), text, bounds))
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


@cache
def usb_algorithms() -> dict[str, Algorithm]:
    """Every algorithm that the installed USB registers, by name; without those of ``NOT_HOSTED``."""
    spec = find_spec("semilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(["semilearn (USB) is not installed: pip install semilearn"])
    classes: dict[str, ast.ClassDef] = {}
    names: dict[str, str] = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "algorithms").glob("*/*.py")):
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
    for name in sorted(names.keys() - NOT_HOSTED):
        step, arguments = method(names[name], "train_step"), method(names[name], "get_argument")
        views = tuple(a.arg for a in step.args.args if a.arg != "self") if step else ()
        catalogue[name] = Algorithm(name, names[name], views, _arguments(name, arguments) if arguments else ())
    return catalogue


def base_algorithms() -> dict[str, Algorithm]:
    """USB's algorithms, this package's own and those of plugins, by name, before MUSCLE is added to them."""
    return usb_algorithms() | OWN_ALGORITHMS | PLUGIN_ALGORITHMS


def muscle_algorithms() -> dict[str, Algorithm]:
    """Every MUSCLE composition by name: ``muscle``, and ``muscle_<name>`` for each algorithm with a weak view of
    unlabelled images that has no MUSCLE of its own. The value is the entry of its base.
    """
    composed = {MUSCLE: usb_algorithms()[MUSCLE_BASE]}
    bases = {n: a for n, a in base_algorithms().items() if n not in HAVE_MUSCLE}
    return composed | {MUSCLE_PREFIX + n: a for n, a in bases.items() if WEAK_UNLABELLED_VIEW in a.views}


def sees_unlabelled(algorithm: str) -> bool:
    """Whether a step of this algorithm sees unlabelled images, as far as is known: MUSCLE's does."""
    base = base_algorithms().get(algorithm)
    return base is None or any(view.endswith("_ulb") or "_ulb_" in view for view in base.views)


def all_algorithms() -> dict[str, Algorithm]:
    """Every algorithm that can be trained, by name."""
    return base_algorithms() | muscle_algorithms()
