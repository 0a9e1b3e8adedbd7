"""Layers of settings, checked together and resolved."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from muscle_plugin.errors import ConfigError, PluginError
from muscle_plugin.registry.catalogue import FITTED
from muscle_plugin.registry.names import DATASETS
from muscle_plugin.registry.plugins import load_all, located
from muscle_plugin.settings.checks import cross_checks, plain, refusal
from muscle_plugin.settings.effects import idle_settings
from muscle_plugin.settings.schema import (
    MACHINE,
    MOST_IMAGES,
    PLACE,
    WITHOUT_EFFECT,
    MuscleSettings,
    RunSettings,
    affecting,
    known_keys,
    owners,
    settings_model,
)
from muscle_plugin.settings.sources import Layer, config_name, find_config, read_saved, read_yaml
from muscle_plugin.text import did_you_mean, shown


@dataclass(frozen=True)
class Resolved:
    """A checked configuration.

    Attributes:
        settings: of every run, and those of the algorithm; cannot be changed.
        sources: the place that gave each setting which is not at its default.
        notices: for the user, one line each.
        name: of the configuration, if it is one of ``benchmark_configs`` (``classic_cv/fixmatch_svhn_40``).
    """

    settings: RunSettings
    sources: Mapping[str, str]
    notices: tuple[str, ...]
    name: str | None = None

    @property
    def run_dir(self) -> Path:
        """The directory of the run, which may not exist yet."""
        return Path(self.settings.save_dir) / str(self.settings.save_name)

    def steps(self, unlabelled: int) -> int:
        """The training steps of the run: ``num_train_iter``, or ``epoch`` passes over so many unlabelled images, of a step
        or more each. Raises ConfigError where ``num_warmup_iter`` takes all of them."""
        s = self.settings
        steps = s.num_train_iter or max(s.epoch, round(s.epoch * unlabelled / (s.total_batch - s.batch_size)))
        if s.num_warmup_iter >= steps:
            raise ConfigError([f"num_warmup_iter: {s.num_warmup_iter} must be less than the run's {steps} steps"])
        return steps

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, plain values; :func:`resolve` makes the same run of them."""
        return self.settings.model_dump()

    def to_yaml(self, leave_out: Sequence[str] = ()) -> str:
        """The settings as YAML, in the order in which they are declared, but for those named."""
        out = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump({k: v for k, v in self.as_dict().items() if k not in leave_out}, out)
        return out.getvalue()


#: The settings that give the sizes of a batch, some of them by two names.
BATCH_SETTINGS = ("total_batch", "ratio", "batch_size", "uratio")


def batch_composition(layers: Sequence[Layer]) -> tuple[int, int]:
    """(J, I): labelled and unlabelled images per step, from ``total_batch``/``ratio`` or USB's ``batch_size``/``uratio``.

    A later layer overrides an earlier one, whichever pair of names it uses. With B given, J = round(B / (1 + r)).
    """
    total, labelled, ratio = 128, 0, Fraction(1)
    for layer in layers:
        place = f"{layer.source}: " if layer.source else ""
        v = {k: x for k, x in layer.values.items() if x is not None}
        if ratios := {Fraction(v[k]).limit_denominator(10**6) for k in ("ratio", "uratio") if k in v}:
            if len(ratios) > 1:
                raise ConfigError([f"{place}ratio {v['ratio']:g} and uratio {v['uratio']:g} are the same setting"])
            ratio = ratios.pop()
        if "total_batch" in v:
            total, labelled = v["total_batch"], 0
            j = round(total / (1 + ratio))
            if v.get("batch_size", j) != j:
                raise ConfigError(
                    [
                        f"{place}batch_size {v['batch_size']} contradicts total_batch {total} with ratio {float(ratio):g}"
                        f" (which gives {j} labelled images); give one of the two"
                    ]
                )
        elif "batch_size" in v:
            labelled = v["batch_size"]
    if labelled:
        unlabelled = round(labelled * ratio)
    else:
        labelled = round(total / (1 + ratio))
        unlabelled = total - labelled
    if labelled + unlabelled > MOST_IMAGES:
        raise ConfigError([f"a step would hold more than {MOST_IMAGES:,} images; lower total_batch or ratio"])
    if labelled < 1 or unlabelled < 1:
        raise ConfigError(
            [f"a step would hold {labelled} labelled and {unlabelled} unlabelled images; both must be at least 1"]
        )
    return labelled, unlabelled


def _with_batch(settings: RunSettings, layers: Sequence[Layer]) -> RunSettings:
    """The settings with the sizes of a batch by all their names."""
    typed = []
    for layer in layers:  # a value that is none is a later layer's to override, or was refused before
        valid, _ = _validated(RunSettings, {k: layer.values[k] for k in BATCH_SETTINGS if k in layer.values})
        typed.append(Layer(layer.source, valid.model_dump(exclude_unset=True)))
    labelled, unlabelled = batch_composition(typed)
    ratio = unlabelled / labelled
    sizes = {"batch_size": labelled, "total_batch": labelled + unlabelled, "ratio": ratio, "uratio": ratio}
    return settings.model_copy(update=sizes)


def spelled(key: str, layer: Layer) -> str:
    """A setting with the place where it was given, for messages."""
    if not layer.source:
        return shown(key)
    return shown(f"--{key}" if layer.source == "command line" else f"{layer.source}: {key}")


def resolve(layers: Sequence[Layer], name: str | None = None) -> Resolved:
    """Check and merge layers, lowest precedence first.

    Args:
        name: of the configuration, if it is one of ``benchmark_configs``; the last layer is then what was given over it.

    Raises:
        ConfigError: with every fault found, one line each.
    """
    faults: list[str] = []
    notices: list[str] = []
    layers = [_cleaned(layer, faults) for layer in layers]
    merged, where = _merged(layers)
    algorithm = merged.get("algorithm", RunSettings.model_fields["algorithm"].default)
    no_such = []
    try:
        model = settings_model(algorithm)
    except ConfigError as e:
        no_such = _placed(e.faults, where)
        merged["algorithm"] = "muscle"  # go on, to report the other faults too
        model = settings_model("muscle")
    faults += no_such
    for key in [k for k in merged if k not in model.model_fields]:
        place = spelled(key, where[key])
        del merged[key]
        if key in WITHOUT_EFFECT:
            notices.append(f"{place} has no effect: {WITHOUT_EFFECT[key]}")
        elif not (having := owners(key)):
            faults.append(f"{place} is not a setting{did_you_mean(key, known_keys())}")
        elif not no_such:
            faults.append(f"{place} is not a setting of {algorithm!r}, but of {', '.join(having)}")
    settings, wrong = _validated(model, merged)
    faults += _placed((f"{k}: {reason}" for k, reason in wrong.items()), where)
    try:
        settings = _with_batch(
            settings, [Layer(x.source, {k: x.values[k] for k in x.values.keys() - wrong}) for x in layers]
        )
    except ConfigError as e:
        faults += e.faults
    faults += _placed(cross_checks(settings), where)
    if faults:
        raise ConfigError(faults)
    for key, reason in idle_settings(settings).items():
        if not where[key].shipped:
            notices.append(f"{spelled(key, where[key])} has no effect: {reason}")
    notices += _about_ratio(settings, layers)
    own, _ = _merged(layers[:-1])
    return Resolved(_finished(settings, name, own), {k: x.source for k, x in where.items()}, tuple(notices), name)


def _cleaned(layer: Layer, faults: list[str]) -> Layer:
    """A layer without what no setting can be, which is added to ``faults``, and in this package's spelling: USB has the
    word None, a truth value for ``resume``, and 0 steps for any number of whole epochs. A path of pretrained weights means to
    use them."""
    values: dict[str, Any] = {}
    for key, given in layer.values.items():
        value = plain(given)
        if key == "plugins":
            try:
                if value is not None and value is not True:  # alone, the flag leaves those of the files below
                    values[key] = located(value, "")
            except PluginError as e:
                faults.append(f"{spelled(key, layer)}: {e}")
        elif reason := refusal(value):
            faults.append(f"{spelled(key, layer)}: {reason}")
        elif isinstance(value, str) and value.startswith("~"):  # a path in a home directory
            values[key] = os.path.expanduser(value)
            if values[key] == value:
                faults.append(f"{spelled(key, layer)}: there is no such user, got {shown(repr(value))}")
        elif value == "None" or (key == "num_train_iter" and str(value) == "0"):
            values[key] = None
        elif key == "resume":  # USB's files set it in every run, the first one too
            values[key] = {"true": "auto", "false": "no"}.get(str(value).lower(), value)
        else:
            values[key] = value
    if values.get("pretrain_path"):
        values.setdefault("use_pretrain", True)
    return replace(layer, values=values)


def _merged(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, Layer]]:
    """The values that hold, and the layer that gave each."""
    merged: dict[str, Any] = {}
    where: dict[str, Layer] = {}
    for layer in layers:
        if layer.values.get("dataset", merged.get("dataset")) != merged.get("dataset"):
            merged.pop("num_classes", None)  # it was another data set's
            where.pop("num_classes", None)
        merged |= layer.values
        where |= dict.fromkeys(layer.values, layer)
    return merged, where


def _validated(model: type[RunSettings], values: Mapping[str, Any]) -> tuple[RunSettings, dict[str, str]]:
    """The settings of the valid values, and what is wrong with the others."""
    try:
        return model(**values), {}
    except ValidationError as e:
        wrong = {str(x["loc"][0]): f"{_reason(x)}, got {shown(repr(x['input']))}" for x in e.errors()}
    return model(**{k: v for k, v in values.items() if k not in wrong}), wrong


def _reason(error: Mapping[str, Any]) -> str:
    """Pydantic's message; of a pattern ``^(a|b)$`` the words that fit it."""
    if error["type"] == "string_pattern_mismatch":
        return f"expected one of {error['ctx']['pattern'].strip('^()$').replace('|', ', ')}"
    return error["msg"][0].lower() + error["msg"][1:]


def _placed(faults: Iterable[str], where: Mapping[str, Layer]) -> list[str]:
    """Faults of settings (``name: what is wrong``) with the place where each was given."""
    parts = [fault.partition(": ") for fault in faults]
    return [f"{spelled(k, where[k]) if k in where else k}: {rest}" for k, _, rest in parts]


def _about_ratio(settings: RunSettings, layers: Sequence[Layer]) -> list[str]:
    """A notice where whole images do not give the ratio asked for."""
    given = [layer.values.get("ratio", layer.values.get("uratio")) for layer in layers]
    asked = next((float(x) for x in reversed(given) if x is not None), None)
    if asked is None or abs(settings.ratio - asked) <= 1e-3:
        return []
    sizes = f"{settings.batch_size} labelled + {settings.total_batch - settings.batch_size} unlabelled images per step"
    return [f"ratio {asked:g} becomes {settings.ratio:.3f}: {sizes} is nearest to it"]


def _finished(settings: RunSettings, name: str | None, own: Mapping[str, Any]) -> RunSettings:
    """Fill in what is left open and follows from other settings, from the data set, or from the configuration: its name, and
    the values that it gives itself, ``own``."""
    info = DATASETS[settings.dataset]
    following = ["num_classes", "img_size", "sequestered", "weak_augment", "hard_augment"]
    if not settings.split_file:  # which says how many images are labelled
        following.append("num_labels")
    update = {n: getattr(info, n) for n in following if getattr(settings, n) is None}
    if settings.amp and settings.precision != "bf16":
        update["precision"] = "fp16"
    if settings.gpu is not None and settings.device != "cpu":
        update["device"] = f"cuda:{settings.gpu}"
    if settings.init_from is not None:
        in_place = settings.init_from.replace("{save_dir}", settings.save_dir)
        update["init_from"] = in_place.replace("{seed}", str(settings.seed))
    if settings.resume != "no":
        update["overwrite"] = False  # as in USB, whose files set both
    if settings.algorithm in FITTED:  # in one step, on features of unit length
        update |= {
            "num_train_iter": 1,
            "epoch": 1,
            "ema_m": 0.0,
            "weight_decay": 0.0,
            "net_l2": True,
            "net_dropout": None,
        }
        update |= {"head": "linear", "net_double_head": False, "num_warmup_iter": 0}
    if settings.save_name is None:
        stem = _stem(settings)
        # the configuration's name may say more (another setting, USB's protocol)
        if name and Path(name).name.startswith(stem) and _stem(_validated(RunSettings, own)[0]) == stem:
            stem = name.replace("/", "-")
        update["save_name"] = f"{stem}_{settings.seed}"
    return settings.model_copy(update={**update, "amp": None, "gpu": None})


def _stem(settings: RunSettings) -> str:
    """Algorithm, data set and labels, as in the name of a run."""
    if settings.split_file:
        labels: object = Path(settings.split_file).stem
    else:
        known = DATASETS.get(settings.dataset)
        labels = settings.num_labels or (known and known.num_labels) or "all"
    return f"{settings.algorithm}_{settings.dataset}_{labels}"


def load_settings(config: str | Path | None = None, **overrides: Any) -> Resolved:
    """The settings of a run from a YAML file, or the name of one of ``benchmark_configs``, and keyword arguments (which
    win), as ``train.py`` would resolve them. Values may be paths, fractions, and scalars of NumPy or PyTorch.

    The argument ``plugins`` imports plugins, and so runs their code: a list of files and modules, or True for those that
    the file names. Without it a file that names some is refused.

    Raises:
        ConfigError: with every fault found.
    """
    path = find_config(config) if config else None
    layers = read_yaml(path) if path else []
    load_plugins(layers, overrides.get("plugins"))
    return resolve([*layers, Layer("command line", overrides)], config_name(path) if path else None)


def load_plugins(layers: Sequence[Layer], given: object) -> None:
    """Import the plugins ``given`` on the command line (True: those of the files' layers); those of files alone are refused."""
    named = next((x for x in reversed(layers) if x.values.get("plugins") is not None), None)
    of_files = named.values["plugins"] if named else ()
    if given is None and named and of_files:
        listed = ", ".join(map(shown, of_files))
        why = "is code, which a configuration cannot have run: add --plugins if you trust it"
        raise ConfigError([f"{named.source}: plugins: {listed}: {why}"])
    try:
        load_all(of_files if given is True else located(given, ""), MuscleSettings.model_fields)
    except PluginError as e:
        place = f"{named.source}: plugins" if given is True and named else "--plugins"
        raise ConfigError([f"{place}: {e}"]) from None


def differing_settings(saved: str | Path, resolved: Resolved) -> dict[str, tuple[Any, Any]]:
    """The settings that may not change on resume and in which a run's ``config.yaml`` and a configuration differ: name ->
    (there, here)."""
    there, here = resolve(read_saved(Path(saved))).as_dict(), resolved.as_dict()
    may_change = affecting(MACHINE, PLACE)
    if resolved.settings.tune != "full":  # the weights are told by their digest, wherever they are
        may_change |= {"pretrain_path", "init_from"}
    return {
        k: (there.get(k), here.get(k)) for k in {**there, **here} if k not in may_change and there.get(k) != here.get(k)
    }


def began_otherwise(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """What :func:`differing_settings` found, for people."""
    listed = "; ".join(f"{k} was {there!r}, now {here!r}" for k, (there, here) in differing.items())
    return f"this run began with other settings: {listed}"
