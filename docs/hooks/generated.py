"""Parts of pages that the package itself writes: its settings, from their models, and its public names."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from muscle_plugin.registry.catalogue import MUSCLE_PREFIX, base_algorithms, muscle_algorithms
from muscle_plugin.registry.names import DATASETS
from muscle_plugin.settings.command_line import SHORT_FLAGS
from muscle_plugin.settings.effects import NO_SHARPENING
from muscle_plugin.settings.schema import MACHINE, PLACE, WITHOUT_EFFECT, MuscleSettings, RunSettings, affecting

#: What settings of USB's algorithms mean for which USB has no help, in all algorithms or in one (``ALGORITHM.NAME``).
MEANINGS = {
    "hard_label": "pseudo-labels are the likeliest class; false: the probabilities",
    "T": "temperature that sharpens pseudo-labels which are probabilities (hard_label false)",
    **dict.fromkeys((f"{a}.T" for a in NO_SHARPENING), "no effect: USB does not sharpen these pseudo-labels"),
    **dict.fromkeys(("comatch.hard_label", "crmatch.hard_label"), "no effect: USB's class does not use it"),
    "p_cutoff": "least confidence of a prediction that becomes a pseudo-label",
    "ema_p": "momentum of the averages behind thresholds and distribution alignment",
    "ent_loss_ratio": "weight of the fairness loss",
    "unsup_warm_up": "share of the run over which the unsupervised loss rises to its weight",
    "proj_size": "dimensions of the projected features",
    "smoothing_alpha": "share of a prediction of its own in the pseudo-label; the rest comes from the memory",
    "da_len": "steps over which distribution alignment averages predictions",
    "rot_loss_ratio": "weight of the loss that predicts rotations",
    "comatch.T": "temperature of the similarities and of the contrastive loss",
    "comatch.contrast_p_cutoff": "similarity of pseudo-labels above which two images are a pair of the contrastive loss",
    "comatch.contrast_loss_ratio": "weight of the contrastive loss",
    "comatch.queue_batch": "length of the memory, in batches",
    "dash.T": "temperature that sharpens the pseudo-labels of the first part of the run",
    "dash.gamma": "the threshold is divided by this every ten epochs",
    "dash.C": "factor of the threshold, which begins at the loss after the warm-up",
    "dash.rho_min": "lowest threshold; from there on pseudo-labels are hard",
    "dash.num_wu_iter": "steps of the warm-up on labelled images before training",
    "dash.num_wu_eval_iter": "steps between two evaluations of the warm-up",
    "flexmatch.thresh_warmup": "images never yet confident count in the scale of the thresholds of classes",
    "sequencematch.thresh_warmup": "images never yet confident count in the scale of the thresholds of classes",
    "freematch.use_quantile": "the global threshold follows the 0.8 quantile of confidences, not their mean",
    "freematch.clip_thresh": "the global threshold is at most 0.95",
    "simmatch.T": "temperature of the similarities",
    "simmatch.K": "no effect: USB puts the number of labelled images in its place",
    "simmatch.in_loss_ratio": "weight of the loss between similarities of instances",
    "softmatch.dist_align": "no effect: USB aligns the distribution of pseudo-labels in any case",
    "softmatch.dist_uniform": "towards equal classes; false: towards the predictions on labelled images",
    "softmatch.n_sigma": "an image whose confidence is below the mean has the weight of a Gaussian of width sigma / n_sigma",
    "softmatch.per_class": "mean and variance of the confidence for each class; true is refused, as USB's class fails with it",
}

#: Of classes that override what USB calls: the methods that others would call.
MEMBERS = {"Host": ["train", "evaluate", "save_model", "load_model", "request_stop"], "Muscle": []}

#: Headings of the groups that comments of the form ``# -- NAME`` begin in ``RunSettings``.
GROUP = re.compile(r"^    # -- (.+)$|^    (\w+): ", re.MULTILINE)
MOVES = "May change on resume."
MACHINES = "Of the machine."
ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "docs" / "api.md"


def groups() -> dict[str, list[str]]:
    """The settings of every run by the comment under which the schema has them."""
    found: dict[str, list[str]] = {}
    before: list[str] = []  # settings above the first comment belong to its group
    for group, name in GROUP.findall(inspect.getsource(RunSettings)):
        if group:
            found[group] = [] if found else before
        elif name in RunSettings.model_fields:
            (found[next(reversed(found))] if found else before).append(name)
    return found


def _cell(text: str) -> str:
    """Text in a cell of a table: what is not code has no HTML."""
    parts = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    return "".join(p if i % 2 else p.replace("<", "&lt;").replace("|", r"\|") for i, p in enumerate(parts))


def _kind(annotation: Any) -> str:
    """The values of a setting, in words: ``int``, ``float or nothing``, ``yes, no, auto``."""
    if get_origin(annotation) is Literal:
        return " ".join(f"`{v}`" for v in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        return "list, or texts with commas between"
    if parts := [a for a in get_args(annotation) if a is not type(None)]:
        return " or ".join(_kind(p) for p in parts)
    names = {int: "whole number", float: "number", bool: "`true` `false`", str: "text"}
    return names.get(annotation) or f"`{annotation}`"


def _bounds(metadata: Iterable[Any]) -> str:
    """``≥ 1, < 10``"""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {_number(getattr(m, k))}" for m in metadata for k, sign in signs.items() if hasattr(m, k)]
    return _cell(", ".join(found))


def _number(value: Any) -> str:
    if isinstance(value, int) and value > 10**5 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"


def _default(value: Any) -> str:
    if value in (None, "", (), PydanticUndefined):
        return "—"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _row(name: str, kind: str, default: Any, text: str, anchor: bool) -> str:
    flag = SHORT_FLAGS.get(name) if anchor else None
    shown = f"`{name}`" + (f"{{ #{name} }}" if anchor else "") + (f" `{flag}`" if flag else "")
    return f"| {' | '.join([shown, kind, _default(default), text])} |"


def _table(rows: Iterable[str]) -> str:
    """A table that becomes a list of cards where the screen is narrow (``site.css``)."""
    head = ["setting", "values", "default", "meaning"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]
    return "\n".join(['<div class="settings" markdown>', "", *lines, "", "</div>"])


def _fields(model: type[BaseModel], names: Iterable[str]) -> str:
    moving, of_machine = affecting(MACHINE, PLACE), affecting(MACHINE)
    rows = []
    for name in names:
        info = model.model_fields[name]
        kind = ", ".join(filter(None, [_kind(info.annotation), _bounds(info.metadata)]))
        marks = [MOVES] * (name in moving) + [MACHINES] * (name in of_machine)
        text = " ".join([_cell(info.description or ""), *(f"*{mark}*" for mark in marks)])
        rows.append(_row(name, kind, info.default, text, True))
    return _table(rows)


def settings() -> str:
    """Every setting of ``RunSettings``, a table for each group."""
    parts = []
    for group, names in groups().items():
        parts.append(f"### {group.capitalize()}\n\n{_fields(RunSettings, names)}")
    return "\n\n".join(parts)


def muscle_settings() -> str:
    """The settings of ``MuscleSettings``."""
    return _fields(MuscleSettings, MuscleSettings.model_fields)


def algorithms() -> str:
    """The settings that each algorithm adds, from the catalogue: those of the USB that is installed, and this package's."""
    without, parts = [], []
    for name, entry in base_algorithms().items():
        own = [a for a in entry.arguments if a.name not in RunSettings.model_fields]
        form = MUSCLE_PREFIX + name
        names = f"`{name}`" + (f", `{form}`" if form in muscle_algorithms() else "")
        if not own:
            without.append(names)
            continue
        kinds = [", ".join(filter(None, [_kind(a.type), _bounds([SimpleNamespace(**dict(a.bounds))])])) for a in own]
        rows = [_row(a.name, k, a.default, _cell(meaning(name, a)), False) for a, k in zip(own, kinds, strict=True)]
        parts.append(f"### {name}\n\nOf {names}.\n\n{_table(rows)}")
    return "\n\n".join([*parts, f"### None of their own\n\n{', '.join(without)}."])


def meaning(algorithm: str, argument: Any) -> str:
    """What a setting of an algorithm does: in USB's words where it has any, else in ours."""
    return argument.help or MEANINGS.get(f"{algorithm}.{argument.name}") or MEANINGS.get(argument.name, "—")


def datasets() -> str:
    """What each data set fills in where a setting is left open."""
    head = ["data set", "`num_labels`", "`img_size`", "`weak_augment`", "`hard_augment`", "`sequestered`", "classes"]
    rows = [
        f"| `{n}` | {d.num_labels or 'all there are'} | {d.img_size} | `{d.weak_augment}` | `{d.hard_augment}` |"
        f" {d.sequestered} | {d.num_classes or 'as in the files'} |"
        for n, d in DATASETS.items()
    ]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def without_effect() -> str:
    """Keys of USB's files that are accepted and change nothing."""
    rows = [f"| `{name}` | {_cell(reason)} |" for name, reason in WITHOUT_EFFECT.items()]
    return "\n".join(["| key | instead |", "|---|---|", *rows])


def names(package: str) -> str:
    """A block of mkdocstrings for each public name of a package or module, read from its source. What another mark of the
    API page shows in its own place is a link to there."""
    public = _public(package)
    elsewhere = {n: other for other in _marked() if other != package for n in _public(other)}
    lazy = getattr(import_module(package), "_LAZY", {}) if package == "muscle_plugin" else {}
    blocks, links = [], []
    for name in public:
        if name == "__version__":
            continue
        home = _home(lazy.get(name, package), name)
        if package == "muscle_plugin" and elsewhere.get(name) == lazy.get(name):
            links.append(f"[`{name}`][{home}.{name}]")
        else:
            members = MEMBERS.get(name)
            blocks.append(
                f"::: {home}.{name}" + (f"\n    options:\n      members: {members}" if members is not None else "")
            )
    below = [f"Further down: {', '.join(links)}."] if links else []
    return "\n\n".join([*below, *blocks])


def _marked() -> list[str]:
    return re.findall(r"^<!-- names: ([\w.]+) -->$", API.read_text(encoding="utf-8"), re.MULTILINE)


def about(module: str) -> str:
    """The docstring of a module."""
    options = ["show_root_heading: false", "show_root_toc_entry: false", "members: false"]
    return "\n".join([f"::: {module}", "    options:", *(f"      {o}" for o in options)])


@cache
def _body(module: str) -> list[ast.stmt]:
    place = ROOT.joinpath(*module.split("."))  # importlib would import its packages, and so PyTorch
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body


def _public(module: str) -> tuple[str, ...]:
    """The ``__all__`` of a module; without one, the functions and classes that it defines, in its order."""
    for node in _body(module):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return tuple(n.name for n in _body(module) if isinstance(n, kinds) and not n.name.startswith("_"))


def _home(module: str, name: str) -> str:
    """The module that defines a name which another one imports, perhaps only when asked for it: a package may have a module
    and a function of one name."""
    if any(getattr(node, "name", None) == name for node in _body(module)):
        return module
    for node in (inner for outer in _body(module) for inner in ast.walk(outer)):
        if isinstance(node, ast.ImportFrom) and name in [a.asname or a.name for a in node.names]:
            return _home(str(node.module), name)
    return module


#: What ``<!-- NAME -->`` or ``<!-- NAME: ARGUMENT -->`` on a line of its own becomes.
MARKS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (settings, muscle_settings, algorithms, datasets, without_effect, names, about)
}
