"""What a value can be before its setting is known, and faults that concern more than one setting."""

from __future__ import annotations

import contextlib
import math
import os
from numbers import Integral, Real
from pathlib import Path

from muscle_plugin.registry.catalogue import (
    FITTED,
    MUSCLE,
    MUSCLE_PREFIX,
    base_algorithms,
    class_mass,
    stage_1_epochs,
)
from muscle_plugin.registry.names import DATASETS, PLUGIN_DATASETS, PLUGIN_NETS, TIMM, DatasetInfo
from muscle_plugin.settings.schema import MOST_CHARACTERS, MOST_WHOLE, OF_ONES_OWN, WITHOUT_LABELS, RunSettings
from muscle_plugin.text import did_you_mean, shown

#: Data sets that are read from image files.
IMAGE_FILES = ("folder", "miniimagenet", "eurosat")


def plain(value: object) -> object:
    """A path as text; a fraction, a scalar of NumPy or PyTorch as a number; anything else as it is."""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def refusal(value: object) -> str | None:
    """Why no setting can have this value: a list or mapping, a text that is no path or name, a number beyond all bounds."""
    if not isinstance(value, (str, int, float, bool, type(None))):
        return f"a single value is expected, got a {type(value).__name__}"
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            return f"a text of {len(value):,} characters is too long"
        with contextlib.suppress(UnicodeEncodeError):
            if all(byte >= 32 and byte != 127 for byte in os.fsencode(value)):
                return None
        return f"holds characters that no name can have, got {shown(repr(value))}"
    return "a number out of all bounds" if type(value) is int and abs(value) > MOST_WHOLE else None


def cross_checks(settings: RunSettings) -> list[str]:
    """Faults (``name: what is wrong``) that concern more than one setting, and names that do not exist."""
    s = settings
    faults = [f"{k}: a number out of all bounds" for k, v in s if type(v) is int and abs(v) > MOST_WHOLE]
    if s.dataset not in DATASETS:
        near = did_you_mean(s.dataset, DATASETS)
        faults.append(f"dataset: unknown {shown(repr(s.dataset))}{near}{OF_ONES_OWN}; known: {', '.join(DATASETS)}")
    else:
        faults += _split_faults(s, DATASETS[s.dataset])
    if s.stage == "pretrain" and s.algorithm not in WITHOUT_LABELS:
        faults.append(f"stage: pretrain is for {', '.join(WITHOUT_LABELS)}; {s.algorithm} needs labels")
    elif s.stage == "pretrain" and s.algorithm == MUSCLE and not getattr(s, "mi_weight", 1):
        faults.append("mi_weight: 0 leaves stage pretrain nothing to train on")
    if s.normalise == "net" and not (s.net_from_name or s.net.startswith(TIMM)):
        faults.append(
            f"normalise: only nets of timm and torchvision say how they were trained; {shown(s.net)} needs data"
        )
    start = getattr(s, "lp_start", None)
    if start is not None and ((start > 0) != (stage_1_epochs(start, s.epoch) > 0)):
        faults.append(
            f"lp_start: {start:g} of {s.epoch} epoch(s) leaves no whole one for the first stage; give more --epoch"
        )
    faults += _class_mass_faults(getattr(s, "lp_class_mass", "none"), s)
    if s.tune != "full" and not (s.use_pretrain or s.init_from or s.net in PLUGIN_NETS):
        faults.append(
            f"tune: {s.tune} keeps a backbone whose weights would be random: give --use_pretrain true, --pretrain_path FILE or"
            " --init_from RUN"
        )
    elif s.tune != "full" and s.use_pretrain and s.init_from:
        faults.append(
            f"tune: {s.tune} takes its backbone from pretrained weights or from init_from; give one of the two"
        )
    if s.overwrite and s.resume == "yes":
        faults.append("overwrite: deletes the run that --resume goes on with; give one of the two")
    for name, needed, default in (("lr_zero_at", "cosine", 1), ("num_warmup_iter", "usb", 0)):
        if s.lr_schedule != needed and getattr(s, name) != default:
            faults.append(f"{name}: requires --lr_schedule {needed}")
    if s.optim == "SGD" and s.momentum == 0:
        faults.append("momentum: USB's SGD has Nesterov momentum, which must be greater than 0")
    base = s.algorithm.removeprefix(MUSCLE_PREFIX)
    for name, of, why in (
        ("per_class", "softmatch", "USB's class reads an attribute that it does not have"),
        ("vat_embed", "vat", "it is for nets of text"),
    ):
        if base == of and getattr(s, name):
            faults.append(f"{name}: true cannot be trained: {why}")
    faults += _frozen_faults(s, base)
    if s.amp and s.precision not in ("fp32", "auto", "fp16"):
        faults.append(f"amp: true is precision fp16, but precision is {s.precision}; give one of the two")
    if s.nonfinite_steps and not s.amp and s.precision not in ("auto", "fp16"):
        faults.append(
            f"nonfinite_steps: only with --precision fp16, whose loss scaler leaves such steps out; with {s.precision}"
            " the weights are lost at the first"
        )
    if s.gpu is not None and s.device not in ("auto", "cuda", f"cuda:{s.gpu}"):
        faults.append(f"gpu: {s.gpu} contradicts device {s.device}; give one of the two")
    if s.num_warmup_iter and s.num_train_iter and s.num_warmup_iter >= s.num_train_iter:
        faults.append(f"num_warmup_iter: {s.num_warmup_iter} must be less than the run's {s.num_train_iter} steps")
    if s.num_train_iter and s.num_train_iter < s.epoch:
        faults.append(f"num_train_iter: {s.num_train_iter} steps cannot hold {s.epoch} epochs; give --epoch 1 with it")
    if s.save_name is not None and (Path(s.save_name).name != s.save_name or s.save_name in ("", ".", "..")):
        faults.append(
            f"save_name: must be a plain directory name, got {shown(repr(s.save_name))}; the folder goes into save_dir"
        )
    return faults


def _frozen_faults(s: RunSettings, base: str) -> list[str]:
    """What cannot be trained on the features of a frozen backbone, and what cannot be without them."""
    if s.tune != "head":
        fitted = f"algorithm: {base} fits a head on the features of a frozen backbone; give --tune head"
        return [fitted] if base in FITTED else []
    views = base_algorithms()[base].views if base in base_algorithms() else ()
    if base in ("vat", "crmatch"):
        what = "perturbs pixels" if base == "vat" else "needs feature maps"
        return [f"tune: {base} {what}, but a head gets the features of whole images; give --tune full"]
    if s.view_pool != "none" and any(view.endswith("_rot") for view in views):
        return [f"view_pool: {base} rotates images, which a pool of views does not hold; give --view_pool none"]
    if s.view_pool != "none" and "x_ulb_m" in views:
        return [f"view_pool: {base} has views of a third strength, which the pool does not hold; give --view_pool none"]
    return []


def _class_mass_faults(given: str, s: RunSettings) -> list[str]:
    classes = s.num_classes or (s.dataset in DATASETS and DATASETS[s.dataset].num_classes)
    with contextlib.suppress(ValueError):
        shares = class_mass(given)
        if isinstance(shares, str):
            return []
        if min(shares) > 0 and sum(shares) < math.inf and len(shares) in (classes or len(shares),):
            return []
    expected = f"none, uniform, equal, labels or {classes or 'as many numbers as classes'}"
    return [
        f"lp_class_mass: expected {expected}{' numbers' if classes else ''} above 0 (5,3,2), got {shown(repr(given))}"
    ]


def _split_faults(s: RunSettings, info: DatasetInfo) -> list[str]:
    faults = []
    if info.num_classes is not None and s.num_classes not in (None, info.num_classes):
        faults.append(f"num_classes: {s.dataset} has {info.num_classes} classes, got {s.num_classes}")
    sequestered = info.sequestered if s.sequestered is None else s.sequestered
    if sequestered and sequestered >= info.subclasses:
        has = f"{info.subclasses} subclasses per class" if info.subclasses > 1 else "no subclasses"
        faults.append(f"sequestered: {s.dataset} has {has}, got {sequestered}")
        return faults
    groups = info.label_groups(sequestered)
    if s.lb_imb_ratio != 1 and sequestered:
        faults.append("lb_imb_ratio: labels are shared equally where subclasses are sequestered; give --sequestered 0")
    elif s.lb_imb_ratio == 1 and not s.split_file and groups and s.num_labels and s.num_labels % groups:
        what = "subclasses that keep labels" if sequestered else "classes"
        faults.append(
            f"num_labels: {s.num_labels} cannot be shared equally by the {groups} {what} of {s.dataset};"
            f" give a multiple of {groups}"
        )
    if s.split_file and s.lb_imb_ratio != 1:
        faults.append("lb_imb_ratio: split_file says which images are labelled; give one of the two")
    for name, allowed in (
        ("labels_csv", IMAGE_FILES[:1]), ("skip_bad_images", IMAGE_FILES), ("allow_outside", IMAGE_FILES),
        ("pixel_range", (*IMAGE_FILES, *PLUGIN_DATASETS)),
    ):  # fmt: skip
        if getattr(s, name) and s.dataset not in allowed:
            faults.append(f"{name}: only for image files (dataset {', '.join(allowed)}), not for {s.dataset}")
    return faults
