"""Settings that change nothing as the others stand: one that a user gives, in place of its default, brings a notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from muscle_plugin.registry.catalogue import (
    FITTED,
    MUSCLE,
    MUSCLE_BASE,
    MUSCLE_PREFIX,
    PLUGIN_ALGORITHMS,
    stage_1_epochs,
)
from muscle_plugin.registry.names import DATASETS, PLUGIN_DATASETS, PLUGIN_NETS
from muscle_plugin.settings.checks import IMAGE_FILES
from muscle_plugin.settings.schema import RunSettings

_TWO_STAGES = ("labelprop", "meanteacher_labelprop")
_SUPERVISED = ("fullysupervised", "supervised", *FITTED)
#: Algorithms whose training step uses no strong view, no ``ulb_loss_ratio``, no ``use_cat``, no ``T``.
NO_STRONG_VIEW = frozenset([
    *_SUPERVISED, *_TWO_STAGES, "meanteacher", "meanteacher_original", "mixmatch", "pimodel", "pseudolabel", "vat",
])  # fmt: skip
NO_ULB_LOSS_RATIO = frozenset([*_SUPERVISED, *_TWO_STAGES, "contrastive", "crmatch", "meanteacher_original"])
NO_USE_CAT = frozenset([*NO_STRONG_VIEW, "contrastive", "remixmatch"])
NO_SHARPENING = frozenset(["adamatch", "defixmatch", "fixmatch", "flexmatch", "musclefixmatch", "refixmatch", "uda"])

#: Settings; whether they change nothing, given all settings and the name of the base algorithm; why, {} being the algorithm.
IDLE: tuple[tuple[str, Callable[[Any, str], object], str], ...] = (
    ("data_dir", lambda s, _: s.dataset == "digits", "digits come with scikit-learn"),
    ("momentum", lambda s, _: s.optim != "SGD", "only optim SGD uses it"),
    ("decay_all", lambda s, _: not s.weight_decay, "weight_decay is 0"),
    ("init_head", lambda s, _: not s.init_from, "init_from is not given"),
    ("init_head", lambda s, _: s.tune == "head", "tune head trains a head of its own"),
    ("net_noise sync_bn layer_decay", lambda s, _: s.tune == "head", "the backbone is not trained"),
    ("num_workers", lambda s, _: s.tune == "head" and s.view_pool != "none", "steps take features from the pool"),
    ("head view_pool", lambda s, _: s.tune != "head", "only tune head uses it"),
    ("lora_rank lora_alpha lora_targets", lambda s, _: s.tune != "lora", "only tune lora uses it"),
    ("load_path", lambda s, _: s.resume == "no", "resume is no"),
    ("pretrain_path", lambda s, _: not s.use_pretrain, "use_pretrain is false"),
    ("normalise", lambda s, _: s.normalise == "data" and not s.use_pretrain, "the net is not pretrained"),
    ("net_size", lambda s, _: s.net_size == (s.img_size or DATASETS[s.dataset].img_size), "images have that size"),
    ("num_workers", lambda s, _: s.data_on == "device", "with data_on device all images are there"),
    ("cache_dir",
     lambda s, _: s.dataset not in (*IMAGE_FILES, *PLUGIN_DATASETS) and (s.tune != "head" or s.view_pool == "none"),
     "the data set has no image files"),
    ("deterministic", lambda s, _: s.device == "cpu", "a CPU is always deterministic"),
    ("split_seed", lambda s, _: s.split_file and s.dataset != "miniimagenet", "split_file gives the labelled images"),
    ("hard_augment hard_ops", lambda s, base: base in NO_STRONG_VIEW and not getattr(s, "mi_weight", 0),
     "{} uses no strong views"),
    ("ulb_loss_ratio", lambda _, base: base in NO_ULB_LOSS_RATIO, "{} does not use it"),
    ("use_cat", lambda _, base: base in NO_USE_CAT, "{} does not use it"),
    ("hard_views mi_labelled mi_batch_norm", lambda s, _: not getattr(s, "mi_weight", 1), "mi_weight is 0"),
    ("T", lambda _, base: base in NO_SHARPENING, "USB does not sharpen the pseudo-labels of {}"),
    ("T", lambda s, base: base in ("freematch", "softmatch") and s.hard_label, "hard_label is true"),
    ("hard_label", lambda _, base: base in ("comatch", "crmatch"), "USB's {} does not use it"),
    ("rot_loss_ratio", lambda s, base: base == "crmatch" and s.rot_loss_ratio, "USB's crmatch treats any value but 0 as 1"),
    ("K", lambda _, base: base == "simmatch", "USB uses the number of labelled images in its place"),
    ("dist_align", lambda _, base: base == "softmatch", "USB's softmatch aligns in any case"),
    ("smoothing_alpha in_loss_ratio", lambda s, base: base in ("comatch", "simmatch") and s.epoch == 1,
     "it is used from the second epoch on"),
    ("unsup_warm_up", lambda s, base: not (s.ulb_loss_ratio or getattr(s, "kl_loss_ratio", 0)), "ulb_loss_ratio is 0"),
    ("contrast_p_cutoff", lambda s, base: base == "comatch" and not s.contrast_loss_ratio, "contrast_loss_ratio is 0"),
    ("temperature", lambda s, base: base == "contrastive" and not s.contrastive_weight, "contrastive_weight is 0"),
    ("consistency_rampup", lambda s, _: not s.consistency, "consistency is 0"),
    ("logit_distance", lambda s, _: not s.net_double_head and s.net not in PLUGIN_NETS, "net_double_head is false"),
    ("num_train_iter epoch lr lr_schedule weak_augment hard_augment optim momentum weight_decay ema_m net_dropout"
     " net_double_head head num_warmup_iter",
     lambda _, base: base in FITTED, "{} fits a linear head in one step"),
    ("lp_gamma", lambda s, _: s.lp_affinity != "cosine", "only lp_affinity cosine uses it"),
    ("lp_method lp_class_mass lp_k lp_affinity lp_gamma lp_alpha lp_max_iter lp_tol",
     lambda s, _: stage_1_epochs(s.lp_start, s.epoch) == s.epoch, "lp_start leaves no epoch for the second stage"),
)  # fmt: skip


def idle_settings(settings: RunSettings) -> Mapping[str, str]:
    """Settings that differ from their defaults and change nothing, each with the reason."""
    base = MUSCLE_BASE if settings.algorithm == MUSCLE else settings.algorithm.removeprefix(MUSCLE_PREFIX)
    of_data = DATASETS[settings.dataset]
    others = {a.name for a in PLUGIN_ALGORITHMS[base].arguments} if base in PLUGIN_ALGORITHMS else ()
    return {
        name: reason.format(settings.algorithm)
        for names, idle, reason in IDLE
        for name in names.split()
        if name not in others
        and (field := type(settings).model_fields.get(name))
        and getattr(settings, name) not in (field.default, getattr(of_data, name, field.default))
        and idle(settings, base)
    }
