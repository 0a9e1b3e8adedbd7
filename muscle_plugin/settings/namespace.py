"""USB's settings, an ``argparse.Namespace`` that its train.py or a notebook fills: read as one more layer, and written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from muscle_plugin.errors import ConfigError
from muscle_plugin.registry.catalogue import MUSCLE, all_algorithms
from muscle_plugin.settings.checks import plain
from muscle_plugin.settings.resolve import BATCH_SETTINGS, Resolved, resolve, spelled
from muscle_plugin.settings.schema import WITHOUT_EFFECT, RunSettings, known_keys, owners, settings_model
from muscle_plugin.settings.sources import Layer, config_name, read_yaml
from muscle_plugin.text import closest, shown

#: What USB's parsers say where nobody did, of keys that change nothing here, and of the sizes of a batch.
_UNASKED = {"clip": 0, "train_sampler": "RandomSampler", "crop_ratio": 0.875, "use_amp": False}
_UNASKED_BATCH = {"batch_size": 8, "uratio": 1}
#: Settings of imbalanced learning, which is not hosted, and what they must be.
_BALANCED = {"imb_algorithm": None, "ulb_imb_ratio": 1, "ulb_num_labels": None}
#: What else USB's parsers, or :func:`write_for_usb`, write into a namespace.
_NO_SETTINGS = frozenset([
    "c", "max_length", "max_length_seconds", "sample_rate", "distributed", "lb_dest_len", "ulb_dest_len", "use_epass", "source",
])  # fmt: skip
#: A key so much like a setting (difflib's ratio) is one misspelt.
_MISSPELT = 0.8


def from_namespace(args: Namespace, own: Collection[str] = ()) -> Resolved:
    """Resolve the settings that USB gathered, or return the attribute ``resolved``.

    USB gives every one of its settings a value and takes any other key: a key that resembles no setting brings a notice. A
    configuration file that USB read (``args.c``) counts as in a run of this package; a value that is not the file's was given
    over it. ``own`` are the settings that the algorithm's class declares. A ConfigError has every fault found.
    """
    if isinstance(resolved := getattr(args, "resolved", None), Resolved):
        return resolved
    given = {k: plain(v) for k, v in vars(args).items()}
    asked = given.get("algorithm", RunSettings.model_fields["algorithm"].default)
    hosted = str(asked) in all_algorithms()  # a class that only USB's registry knows is not
    path = Path(str(given.get("c") or "."))
    files = read_yaml(path) if path.is_file() else []
    for layer in files:
        layer.values.pop("plugins", None)  # USB cannot have imported them
    places = {key: layer for layer in files for key in layer.values}
    in_files = {key: layer.values[key] for key, layer in places.items()}
    settings = settings_model(str(asked) if hosted else MUSCLE).model_fields
    faults, notices = _other_keys({k: places.get(k, Layer("")) for k in given if k not in settings}, given, own)

    # what has an effect in a class that only USB knows is not known here: no notices
    layers = [
        replace(x, values={k: v for k, v in x.values.items() if k in settings}, shipped=x.shipped or not hosted)
        for x in files
    ]
    values = {k: v for k, v in given.items() if k in settings and not (k in in_files and in_files[k] == v)}
    by_files = any(k in in_files for k in BATCH_SETTINGS)
    for key, other in (("batch_size", "total_batch"), ("uratio", "ratio")):
        if values.get(key) == _UNASKED_BATCH[key] and (by_files or values.get(other) is not None):
            del values[key]
    values.pop("plugins", None)
    if given.get("precision") in ("bf16", "auto"):  # of settings that were written before, amp says what that came to
        values.pop("amp", None)
    if not hosted:
        values["algorithm"] = MUSCLE
    try:
        resolved = resolve([*layers, Layer("", values, not hosted)], config_name(path) if files else None)
    except ConfigError as e:
        raise ConfigError([*faults, *e.faults]) from None
    if faults:
        raise ConfigError(faults)
    found = resolved.settings if hosted else resolved.settings.model_copy(update={"algorithm": str(asked)})
    return replace(resolved, settings=found, notices=(*notices, *resolved.notices))


def _other_keys(
    where: Mapping[str, Layer], given: Mapping[str, Any], own: Collection[str]
) -> tuple[list[str], list[str]]:
    """Faults of keys that are no settings of the algorithm, and notices."""
    faults, notices, unread = [], [], []
    for key, layer in where.items():
        value, place = given[key], spelled(key, layer)
        if key == "extends":
            faults.append(f"{place}: has not been followed: this USB knows no `extends` (patch 0011 adds it)")
        elif key in _BALANCED:
            if value not in (_BALANCED[key], None, "None"):
                faults.append(f"{place}: {shown(value)} is not hosted; use USB's own class of the algorithm")
        elif key in WITHOUT_EFFECT:
            if value != _UNASKED.get(key, value):
                notices.append(f"{place} has no effect: {WITHOUT_EFFECT[key]}")
        elif key in own or key in _NO_SETTINGS:
            pass
        elif having := owners(key):
            if value not in having.values():
                asked = shown(repr(given.get("algorithm")))
                notices.append(f"{place} has no effect: not a setting of {asked}, but of {', '.join(having)}")
        elif near := closest(key, {*known_keys(), *own}, _MISSPELT):
            faults.append(f"{place} is not a setting; did you mean {near[0]!r}?")
        else:
            unread.append(key)
    if unread:
        notices.append(f"{', '.join(map(shown, unread))}: not a setting of USB or this package; nothing reads it")
    return faults, notices


def write_for_usb(args: Namespace, settings: RunSettings, rank: int = 0, world_size: int = 1, **facts: object) -> None:
    """Write into USB's namespace what its classes and its train.py read: the settings, in USB's types and under its names, and
    ``facts`` that only the data and the device tell, some in place of settings."""
    labelled, unlabelled = settings.batch_size, settings.total_batch - settings.batch_size
    vars(args).update(
        {
            **dict(settings),
            # exact: USB computes sizes such as int(queue * (uratio + 1) * batch_size), where a float falls short
            "uratio": Fraction(unlabelled, labelled) if unlabelled % labelled else unlabelled // labelled,
            "resume": settings.resume != "no",
            "use_wandb": settings.use_wandb and not rank,
            "use_aim": settings.use_aim and not rank,
            "rank": rank,
            "world_size": world_size,
            "distributed": world_size > 1,
            "multiprocessing_distributed": world_size > 1,
            "imb_algorithm": None,
            "ulb_imb_ratio": 1,
            "ulb_num_labels": None,
            # git main's CoMatch and SimMatch read it without naming it among their arguments
            "use_epass": getattr(args, "use_epass", False),
            **facts,
        }
    )
