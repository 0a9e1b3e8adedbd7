"""Layers of settings checked together and resolved."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML

from muscle_plugin.text import closest, did_you_mean, shown
from muscle_plugin.errors import CatalogueError, ConfigError, PluginError
from muscle_plugin.registry.catalogue import MUSCLE, all_algorithms
from muscle_plugin.registry.names import DATASETS, DatasetInfo
from muscle_plugin.registry.own import stage_1_epochs
from muscle_plugin.registry.plugins import load_all, located
from muscle_plugin.settings.schema import (
    _BALANCED,
    _IN_USB,
    _MISSPELT,
    _NO_SETTINGS,
    MOST_CHARACTERS,
    MOST_IMAGES,
    MOST_WHOLE,
    OF_ONES_OWN,
    WITHOUT_EFFECT,
    WITHOUT_LABELS,
    Ratio,
    RunSettings,
    _defaults,
    _known_keys,
    _owners,
    moving_settings,
    settings_model,
)
from muscle_plugin.settings.sources import Layer, config_name, find_config, read_saved, read_yaml


@dataclass(frozen=True)
class Resolved:
    """A checked configuration: the settings, where each explicit one came from, notices for the user, and the name of the
    configuration file if it is one of ``benchmark_configs`` (``muscle_digits_10``, ``classic_cv/fixmatch_svhn_40``)."""

    settings: Any
    sources: Mapping[str, str]
    notices: tuple[str, ...]
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, plain values; read back by :func:`resolve` they give the same run."""
        return self.settings.model_dump()

    def to_yaml(self, leave_out: Sequence[str] = ()) -> str:
        """The settings as YAML, in the order in which they are declared, but for those named."""
        from io import StringIO

        out = StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump({k: v for k, v in self.as_dict().items() if k not in leave_out}, out)
        return out.getvalue()


# ---------------------------------------------------------------------------------------------------------- batch sizes


def batch_composition(layers: Sequence[Layer]) -> tuple[int, int]:
    """(J, I): labelled and unlabelled images per step, from ``total_batch``/``ratio`` or USB's ``batch_size``/``uratio``.

    A later layer overrides an earlier one, whichever pair of names it uses. With B given, J = round(B / (1 + r)).

    Raises:
        ConfigError: two names in one layer that contradict each other, or no room for an image of either kind.
    """
    total: int | None = 128
    labelled: int | None = None
    ratio = Fraction(1)
    for layer in layers:
        v = {k: x for k, x in layer.values.items() if x is not None}
        if "ratio" in v or "uratio" in v:
            ratios = {Fraction(v[k]).limit_denominator(10**6) for k in ("ratio", "uratio") if k in v}
            if len(ratios) > 1:
                raise ConfigError([f"{layer.source}: ratio {v['ratio']} and uratio {v['uratio']} are the same setting"])
            ratio = ratios.pop()
        if "total_batch" in v and "batch_size" in v:
            total, labelled = v["total_batch"], v["batch_size"]
            if labelled != _labelled(total, ratio):
                raise ConfigError(
                    [
                        f"{layer.source}: batch_size {labelled} contradicts total_batch {total} with ratio {float(ratio):g}"
                        f" (which gives {_labelled(total, ratio)} labelled images); give one of the two"
                    ]
                )
        elif "total_batch" in v:
            total, labelled = v["total_batch"], None
        elif "batch_size" in v:
            total, labelled = None, v["batch_size"]
    if total is not None:
        labelled = _labelled(total, ratio)
        unlabelled = total - labelled
    else:
        assert labelled is not None
        unlabelled = round(labelled * ratio)
    if labelled < 1 or unlabelled < 1 or labelled + unlabelled > MOST_IMAGES:
        if labelled + unlabelled > MOST_IMAGES:
            raise ConfigError([f"a step would hold more than {MOST_IMAGES:,} images; lower total_batch or ratio"])
        raise ConfigError(
            [f"a step would hold {labelled} labelled and {unlabelled} unlabelled images; both must be at least 1"]
        )
    return labelled, unlabelled


def _labelled(total: int, ratio: Fraction) -> int:
    return round(total / (1 + ratio))


# ------------------------------------------------------------------------------------------------------------ resolving


def _spelling(key: str, layer: Layer) -> str:
    if not layer.source:
        return key
    return f"--{key}" if layer.source == "command line" else f"{layer.source}: {key}"


def _from_usb_values(layer: Layer) -> None:
    """Values that USB spells differently: a boolean for ``resume``, the word None for nothing, and a number of steps where
    its train.py takes no other value (0 holds any number of whole epochs)."""
    for key, value in list(layer.values.items()):
        if value == "None" or (key == "num_train_iter" and str(value) == "0"):
            layer.values[key] = None
    asked = str(layer.values.get("resume")).lower()
    if asked in ("true", "false"):  # USB's files set it in every run, the first one too
        layer.values["resume"] = "auto" if asked == "true" else "no"


def resolve(layers: Sequence[Layer], name: str | None = None) -> Resolved:
    """Check and merge layers, lowest precedence first.

    Args:
        layers: of settings.
        name: of the configuration file, if it is one of ``benchmark_configs``.

    Raises:
        ConfigError: with every fault found, one line each.
    """
    faults: list[str] = []
    notices: list[str] = []
    for layer in layers:
        faults += _plugin_faults(layer)
        faults += _refused_values(layer)
        _from_usb_values(layer)
    merged: dict[str, Any] = {}
    where: dict[str, Layer] = {}
    for layer in layers:
        if layer.values.get("dataset", merged.get("dataset")) != merged.get("dataset"):
            merged.pop("num_classes", None)  # it was another data set's
            where.pop("num_classes", None)
        for key, value in layer.values.items():
            merged[key], where[key] = value, layer

    try:
        algorithm = merged.get("algorithm", RunSettings.model_fields["algorithm"].default)
        entry_faults: list[str] = []
        try:
            model = settings_model(algorithm)
        except ConfigError as e:
            entry_faults, model = e.faults, settings_model("muscle")  # go on, to report the other faults too
            merged["algorithm"] = "muscle"
        known = _known_keys()
    except CatalogueError as e:
        raise ConfigError([str(e)]) from None
    faults += [f"{_spelling('algorithm', where['algorithm'])}: {f.removeprefix('algorithm: ')}" for f in entry_faults]

    for key in [k for k in merged if k not in model.model_fields]:
        spelled = _spelling(key, where[key])
        del merged[key]
        if key in WITHOUT_EFFECT:
            notices.append(f"{spelled} has no effect: {WITHOUT_EFFECT[key]}")
        elif owners := _owners(key):
            if not entry_faults:
                faults.append(f"{spelled} is not a setting of {algorithm!r}, but of {', '.join(owners)}")
        else:
            faults.append(f"{shown(spelled)} is not a setting{did_you_mean(key, known)}")

    settings, wrong = _validated(model, merged)
    faults += _placed(wrong, where)
    for fault in wrong:
        for layer in layers:
            layer.values.pop(fault.partition(": ")[0], None)
    try:
        typed = [Layer(x.source, {k: _typed(x, k) for k in x.values if k in _BATCH_TYPES}) for x in layers]
        labelled, unlabelled = batch_composition(typed)
        settings = settings.model_copy(
            update={
                "batch_size": labelled, "total_batch": labelled + unlabelled,
                "ratio": unlabelled / labelled, "uratio": unlabelled / labelled,
            }
        )  # fmt: skip
    except ConfigError as e:
        faults += e.faults
    faults += _placed(_cross_checks(settings), where)
    if faults:
        raise ConfigError(faults)
    if settings.load_path and settings.resume == "no":
        notices.append(f"{_spelling('load_path', where['load_path'])} has no effect without resume")
    given = [layer.values.get("ratio", layer.values.get("uratio")) for layer in layers]
    asked = next((x for x in reversed(given) if x is not None), None)
    if asked is not None and abs(settings.ratio - float(asked)) > 1e-3:
        sizes = (
            f"{settings.batch_size} labelled + {settings.total_batch - settings.batch_size} unlabelled images a step"
        )
        notices.append(f"ratio {float(asked):g} becomes {settings.ratio:.3f}: {sizes} is nearest to it")
    return Resolved(_finish(settings, name), {k: x.source for k, x in where.items()}, tuple(notices), name)


def _validated(model: type[BaseModel], values: dict[str, Any]) -> tuple[Any, list[str]]:
    """The settings of those values that are valid (there may be faults between them), and what is wrong with the others."""
    try:
        return model(**values), []
    except ValidationError as e:
        wrong = [(str(error["loc"][0]), _readable(error)) for error in e.errors()]
    names = dict(wrong)
    return model(**{k: v for k, v in values.items() if k not in names}), [f"{k}: {reason}" for k, reason in wrong]


def _placed(faults: Iterable[str], where: Mapping[str, Layer]) -> list[str]:
    """Faults of settings (``name: what is wrong``) with the place where each was given."""
    parts = [fault.partition(": ") for fault in faults]
    return [f"{_spelling(k, where[k]) if k in where else k}: {rest}" for k, _, rest in parts]


def check_usb_settings(
    given: Mapping[str, Any], files: Sequence[Layer] = (), own: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Check settings that USB gathered, from a notebook or by its train.py, as :func:`resolve` checks this package's. USB
    gives all of its settings values and takes any other key: what resembles no setting is the user's own affair.

    Args:
        given: name -> value.
        files: what configuration files said, to name them.
        own: names of settings that the algorithm declares.

    Returns:
        Values that are not of their setting's type, in that type; notices.

    Raises:
        ConfigError: with every fault found.
    """
    asked = given.get("algorithm", RunSettings.model_fields["algorithm"].default)
    algorithm = asked if isinstance(asked, str) and asked in all_algorithms() else MUSCLE
    model, known = settings_model(algorithm), _known_keys()
    places = {name: layer.source for layer in files for name in layer.values}
    where = {name: Layer(places.get(name, "")) for name in given}
    faults, notices, unread = [], [], []
    values = Layer("")
    for key, value in given.items():
        spelled = shown(_spelling(key, where[key]))
        if key == "extends":
            faults.append(f"{spelled}: has not been followed: this USB knows no `extends` (patch 0011 adds it)")
        elif key in _BALANCED:
            if value not in (_BALANCED[key], None, "None"):
                faults.append(f"{spelled}: {shown(value)} is not hosted; use USB's own class of the algorithm")
        elif key in model.model_fields:
            part = Layer(where[key].source, {key: _plain(value)})
            faults += _refused_values(part)
            values.values |= part.values
        elif key in WITHOUT_EFFECT:
            if value != _IN_USB.get(key, value):
                notices.append(f"{spelled} has no effect: {WITHOUT_EFFECT[key]}")
        elif key in own or key in _NO_SETTINGS:
            pass
        elif owners := _owners(key):
            if value not in _defaults(key):
                notices.append(
                    f"{spelled} has no effect: not a setting of {shown(repr(asked))}, but of {', '.join(owners)}"
                )
        elif near := closest(key, {*known, *own}, _MISSPELT):
            faults.append(f"{spelled} is not a setting; did you mean {near[0]!r}?")
        else:
            unread.append(key)
    if unread:
        notices.append(
            f"{', '.join(map(shown, unread))}: not a setting of USB or this package, which read no such thing"
        )
    values.values.pop("plugins", None)
    _from_usb_values(values)
    settings, wrong = _validated(model, values.values)
    faults += _placed(wrong, where)
    if given.get("source") is None:
        if settings.precision == "bf16":  # of settings that have trained before, amp says so too
            settings = settings.model_copy(update={"amp": None})
        faults += _placed(_cross_checks(settings), where)
    if faults:
        raise ConfigError(faults)
    as_here = {k: getattr(settings, k) for k in values.values if k != "resume"}  # USB's hooks want its truth value
    alike = (int, float)  # a whole number where another would do
    return {k: v for k, v in as_here.items() if (type(given[k]), type(v)) not in ((type(v), type(v)), alike)}, notices


def _plain(value: Any) -> Any:
    """A path as text; a fraction, a scalar of NumPy or PyTorch as a number; anything else as it is."""
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


_BATCH_TYPES: dict[str, TypeAdapter[Any]] = {
    "total_batch": TypeAdapter(int | None), "batch_size": TypeAdapter(int | None),
    "ratio": TypeAdapter(Ratio | None), "uratio": TypeAdapter(Ratio | None),
}  # fmt: skip


def _refused_values(layer: Layer) -> list[str]:
    """Take out of a layer what no setting can be, and say so: lists and mappings, texts that no path or name can be, whole
    numbers beyond all bounds."""
    faults = []
    for key, value in list(layer.values.items()):
        reason = ""
        if key == "plugins":
            continue
        if not isinstance(value, (str, int, float, bool, type(None))):
            reason = f"a single value is expected, got a {type(value).__name__}"
        elif isinstance(value, str) and len(value) > MOST_CHARACTERS:
            reason = f"a text of {len(value):,} characters is too long"
        elif isinstance(value, str) and not _can_be_name(value):
            reason = f"holds characters that no name can have, got {shown(repr(value))}"
        elif type(value) is int and abs(value) > MOST_WHOLE:
            reason = "a number out of all bounds"
        if reason:
            faults.append(f"{shown(_spelling(key, layer))}: {reason}")
            del layer.values[key]
    return faults


def _plugin_faults(layer: Layer) -> list[str]:
    """Put absolute names into a layer; of ``--plugins`` alone nothing, so that those of the files below it hold."""
    value = layer.values.pop("plugins", None)
    if value is None or value is True:
        return []
    try:
        layer.values["plugins"] = located(value, "")
    except PluginError as e:
        return [f"{shown(_spelling('plugins', layer))}: {e}"]
    return []


def _can_be_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return not any(c < " " or c == "\x7f" for c in text)


def _typed(layer: Layer, key: str) -> Any:
    """A layer's value in the type of the setting (a command line gives strings).

    Raises:
        ConfigError: a later layer hides that it is none.
    """
    try:
        return _BATCH_TYPES[key].validate_python(layer.values[key])
    except ValidationError as e:
        raise ConfigError([f"{_spelling(key, layer)}: {_readable(e.errors()[0])}"]) from None


def _readable(error: Any) -> str:
    got = error.get("input")
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {shown(repr(got))}"


def _cross_checks(settings: Any) -> list[str]:
    """Faults that concern more than one setting, or names that must exist."""
    faults = [f"{k}: a number out of all bounds" for k, v in settings if type(v) is int and abs(v) > MOST_WHOLE]
    if settings.dataset not in DATASETS:
        faults.append(
            f"dataset: unknown {shown(repr(settings.dataset))}{did_you_mean(settings.dataset, DATASETS)}{OF_ONES_OWN};"
            f" known: {', '.join(DATASETS)}"
        )
    else:
        faults += _split_faults(settings, DATASETS[settings.dataset])
    if settings.stage == "pretrain" and settings.algorithm not in WITHOUT_LABELS:
        faults.append(f"stage: pretrain is for {', '.join(WITHOUT_LABELS)}; {settings.algorithm} needs labels")
    elif settings.stage == "pretrain" and settings.algorithm == MUSCLE and not settings.mi_weight:
        faults.append("mi_weight: 0 leaves stage pretrain nothing to train on")
    start = getattr(settings, "lp_start", None)
    if start is not None and not 0 <= start <= 1:
        faults.append(f"lp_start: a share of the epochs, from 0 to 1, got {start:g}")
    elif start is not None and ((start > 0) != (stage_1_epochs(start, settings.epoch) > 0)):
        faults.append(
            f"lp_start: {start:g} of {settings.epoch} epoch(s) leaves no whole one for the first stage; give more --epoch"
        )
    if settings.overwrite and settings.resume == "yes":
        faults.append("overwrite: deletes the run that --resume goes on with; give one of the two")
    if settings.lr_schedule != "cosine" and settings.lr_zero_at != 1:
        faults.append("lr_zero_at: only with --lr_schedule cosine")
    if settings.amp and settings.precision not in ("fp32", "auto", "fp16"):
        faults.append(f"amp: true is precision fp16, but precision is {settings.precision}; give one of the two")
    if settings.nonfinite_steps and not settings.amp and settings.precision not in ("auto", "fp16"):
        faults.append(
            f"nonfinite_steps: only with --precision fp16, whose loss scaler leaves such steps out; with {settings.precision}"
            " the weights are lost at the first"
        )
    if settings.gpu is not None and settings.device not in ("auto", "cuda", f"cuda:{settings.gpu}"):
        faults.append(f"gpu: {settings.gpu} contradicts device {settings.device}; give one of the two")
    if settings.num_warmup_iter and settings.num_train_iter and settings.num_warmup_iter >= settings.num_train_iter:
        faults.append(f"num_warmup_iter: {settings.num_warmup_iter} leaves no step of the {settings.num_train_iter}")
    if settings.num_train_iter and settings.num_train_iter < settings.epoch:
        faults.append(
            f"num_train_iter: {settings.num_train_iter} steps cannot hold {settings.epoch} epochs; give --epoch 1 with it"
        )
    if settings.save_name is not None and (
        Path(settings.save_name).name != settings.save_name or settings.save_name in ("", ".", "..")
    ):
        faults.append(
            f"save_name: must be a plain directory name, got {shown(repr(settings.save_name))}; the folder goes into save_dir"
        )
    return faults


def _split_faults(settings: Any, info: DatasetInfo) -> list[str]:
    faults = []
    if info.num_classes is not None and settings.num_classes not in (None, info.num_classes):
        faults.append(f"num_classes: {settings.dataset} has {info.num_classes} classes, got {settings.num_classes}")
    sequestered = info.sequestered if settings.sequestered is None else settings.sequestered
    if sequestered and sequestered >= info.subclasses:
        has = f"{info.subclasses} subclasses per class" if info.subclasses > 1 else "no subclasses"
        faults.append(f"sequestered: {settings.dataset} has {has}, got {sequestered}")
        return faults
    groups = info.label_groups(sequestered)
    if settings.lb_imb_ratio != 1 and sequestered:
        faults.append("lb_imb_ratio: labels are shared equally where subclasses are sequestered; give --sequestered 0")
    elif (
        settings.lb_imb_ratio == 1 and not settings.split_file
        and groups and settings.num_labels and settings.num_labels % groups
    ):  # fmt: skip
        what = "subclasses that keep labels" if sequestered else "classes"
        faults.append(
            f"num_labels: {settings.num_labels} cannot be shared equally by the {groups} {what} of {settings.dataset};"
            f" give a multiple of {groups}"
        )
    if settings.split_file and settings.lb_imb_ratio != 1:
        faults.append("lb_imb_ratio: split_file says which images are labelled; give one of the two")
    files = ("folder", "miniimagenet", "eurosat")
    of_files = {"labels_csv": ("folder",), "skip_bad_images": files, "allow_outside": files}
    for name, allowed in of_files.items():
        if getattr(settings, name) and settings.dataset not in allowed:
            faults.append(f"{name}: only for image files (dataset {', '.join(allowed)}), not for {settings.dataset}")
    return faults


def following(settings: Any) -> dict[str, Any]:
    """The settings that follow from others and are left open: the data set's, the device and precision by USB's names, the
    fields of ``init_from``."""
    info = DATASETS[settings.dataset]
    update: dict[str, Any] = {"num_classes": settings.num_classes or info.num_classes, **info.defaults(settings)}
    if settings.amp and settings.precision != "bf16":
        update["precision"] = "fp16"
    if settings.gpu is not None and settings.device != "cpu":
        update["device"] = f"cuda:{settings.gpu}"
    if settings.init_from is not None:
        fields = {"{save_dir}": settings.save_dir, "{seed}": str(settings.seed)}
        for field_name, value in fields.items():
            update["init_from"] = update.get("init_from", settings.init_from).replace(field_name, value)
    return update


def _finish(settings: Any, name: str | None) -> Any:
    """Fill in what follows from other settings, and from the name of the configuration."""
    update = following(settings)
    if settings.resume != "no":
        update["overwrite"] = False  # as in USB, whose files set both
    if settings.save_name is None:
        labels = (
            Path(settings.split_file).stem if settings.split_file else update.get("num_labels", settings.num_labels)
        )
        stem = f"{settings.algorithm}_{settings.dataset}_{labels or 'all'}"
        if name is not None and Path(name).name.startswith(stem):  # it says more: another setting, USB's protocol
            stem = name.replace("/", "-")
        update["save_name"] = f"{stem}_{settings.seed}"
    return settings.model_copy(update=update | {"amp": None, "gpu": None})


def load_settings(config: str | Path | None = None, **overrides: Any) -> Resolved:
    """The settings of a run from a YAML file, or the name of one of ``benchmark_configs``, and keyword arguments (which
    win), as ``train.py`` would resolve them.

    The argument ``plugins`` imports plugins, and so runs their code: a list of files and modules, or True for those that
    the file names. Without it a file that names some is refused.

    Raises:
        ConfigError: with every fault found.
    """
    path = find_config(config) if config else None
    layers = read_yaml(path) if path else []
    load_plugins(layers, overrides.get("plugins"))
    return resolve([*layers, Layer("command line", overrides)], config_name(path) if path else None)


def load_plugins(layers: Sequence[Layer], given: Any) -> None:
    """Import the plugins of a run.

    Args:
        layers: of its files.
        given: the setting on the command line: names; True: those of the files; None: not given.

    Raises:
        ConfigError: a plugin cannot be had, or the files name some and none was given.
    """
    named = next((x for x in reversed(layers) if x.values.get("plugins") is not None), None)
    of_files = named.values["plugins"] if named else ()
    if given is None and named and of_files:
        raise ConfigError(
            [
                f"{named.source}: plugins: {', '.join(map(shown, of_files))}: is code, which a configuration cannot have run:"
                " add --plugins if you trust it"
            ]
        )
    try:
        load_all(of_files if given is True else located(given, ""))
    except PluginError as e:
        place = f"{named.source}: plugins" if given is True and named else "--plugins"
        raise ConfigError([f"{place}: {e}"]) from None


def differing_settings(saved: str | Path, resolved: Resolved) -> dict[str, tuple[Any, Any]]:
    """What a run's ``config.yaml`` and a configuration differ in, of the settings that a result depends on: name ->
    (there, here).

    Raises:
        ConfigError: the file cannot be read, or holds what is no setting.
    """
    there, here = resolve(read_saved(Path(saved))).as_dict(), resolved.as_dict()
    moves = moving_settings()
    return {k: (there.get(k), here.get(k)) for k in {**there, **here} if k not in moves and there.get(k) != here.get(k)}


def began_otherwise(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """What :func:`differing_settings` found of a run and the settings it is to go on with, for people."""
    listed = "; ".join(f"{k} was {there!r}, now {here!r}" for k, (there, here) in differing.items())
    return f"this run began with other settings: {listed}"
