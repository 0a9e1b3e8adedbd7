"""A trained net for use elsewhere: ``muscle-plugin export``, and :func:`load_exported` that reads it back.

An exported folder holds ``model.safetensors`` with ``config.json``, ``model.onnx``, or both. Nets of timm are written as
timm writes its own (``timm.create_model("local-dir:FOLDER", pretrained=True)``), others with the names of this package.
Nothing is left behind that does not give the checkpoint's own predictions on real images.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.errors import ExportError, InputError
from muscle_plugin.files import load_safetensors, read_json, refuse_existing, write_json, writing
from muscle_plugin.inference.compare import Comparison, images_of_the_run, read_images
from muscle_plugin.inference.onnx_file import write_onnx
from muscle_plugin.inference.predict import Predictor
from muscle_plugin.inference.trained import Classifier, Trained, read_trained, rebuild
from muscle_plugin.registry.names import TIMM
from muscle_plugin.run_files import checkpoint_of
from muscle_plugin.version import __version__

__all__ = ["ExportError", "export_model", "load_exported"]

WEIGHTS, CONFIG, ONNX = "model.safetensors", "config.json", "model.onnx"
#: The key of ``config.json`` under which this package's part stands, and the version of its form.
OURS, FORMAT = "muscle_plugin", 1
TOLERANCE = 1e-4
#: Packages that a format needs.
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxruntime", "onnxscript")}


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    format: str = "both",
    images: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Write the averaged net of a checkpoint to a new folder; returns lines that say what was written and checked.

    Args:
        checkpoint: a run's folder, or a checkpoint in it.
        out: folder to make.
        format: ``safetensors``, ``onnx`` or ``both``.
        images: a folder of images, or one, to compare the export with the checkpoint on; None: test images of the run's
            data set (training images if it has none).
        tolerance: largest accepted difference of a logit, relative to the largest logit or 1.

    Raises:
        InputError: an input is no checkpoint, ``out`` exists, or a package is missing.
        DataError: the images to compare on cannot be had.
        ExportError: torch cannot express the net in ONNX, or a difference is larger than ``tolerance``.
        WriteError: ``out`` cannot be written.
    """
    out = Path(out)
    wanted = ("safetensors", "onnx") if format == "both" else (format,)
    for name in wanted:
        _refuse_missing(name)
    refuse_existing(out, "choose another output folder")
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"--tolerance: must be 0 or more, got {tolerance}")
    used = checkpoint_of(Path(checkpoint))
    trained = read_trained(used)
    info, size = trained.info, trained.info.img_size
    pixels = read_images(Path(images), size) if images is not None else images_of_the_run(used, size)
    comparison = Comparison(pixels, Predictor(trained, "cpu").logits(pixels), tolerance)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            if "safetensors" in wanted:
                _write_safetensors(trained, part, comparison)
            if "onnx" in wanted:
                write_onnx(trained, part / ONNX, comparison)  # last: it folds the net's weights
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return [
        f"{info.net} of {used} ({info.weights} weights, step {info.step}, {len(info.classes)} classes): {out}",
        *(
            f"{name}: largest difference of a logit {d:.2g} over {len(pixels)} images"
            for name, d in comparison.found.items()
        ),
    ]


def load_exported(folder: str | Path, device: str = "auto") -> Predictor:
    """Read what ``muscle-plugin export`` wrote as safetensors: ``probabilities`` and ``logits`` of uint8 RGB images,
    ``classes``, ``img_size``, and the net itself as ``classifier.net``.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: no such folder, damaged, or USB is needed for its net and not installed.
        DeviceError: no such device.
    """
    folder = Path(folder)
    try:
        own = read_json(folder / CONFIG).get(OURS)
    except OSError as e:
        raise InputError(f"{folder / CONFIG}: cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise InputError(f"{folder / CONFIG}: damaged ({e})") from None
    if not isinstance(own, dict):
        raise InputError(f"{folder / CONFIG}: not written by muscle-plugin export: there is no {OURS!r} in it")
    if own.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG}: of format {own.get('format')!r}; this version reads {FORMAT}")
    weights = load_safetensors(folder / WEIGHTS)
    if own.get("layout") == "timm":
        weights = _from_timm(weights, str(own.get("timm_classifier")))
    return Predictor(rebuild(own, weights, folder), device)


def _write_safetensors(trained: Trained, folder: Path, comparison: Comparison) -> None:
    from safetensors.torch import save

    info = trained.info
    own = {
        "format": FORMAT,
        "version": __version__,
        "load": "muscle_plugin.load_exported(FOLDER)",
        "layout": "muscle_plugin",
        **info.model_dump(),
    }
    config = {"architecture": info.net, "num_classes": len(info.classes), "label_names": info.classes}
    weights = trained.net.state_dict()
    as_timm = _to_timm(trained, comparison) if info.net.startswith(TIMM) else None
    if as_timm is not None:
        config, weights, classifier = as_timm
        own |= {"layout": "timm", "timm_classifier": classifier}
    # no two tensors may share memory in such a file
    whole = {n: t.detach().clone().contiguous() for n, t in weights.items()}
    (folder / WEIGHTS).write_bytes(save(whole, metadata={"format": "pt"}))
    write_json(folder / CONFIG, {**config, OURS: own})
    comparison.check(f"{WEIGHTS} by load_exported", load_exported(folder, "cpu").logits(comparison.images))
    if as_timm is not None:
        model = _timm_model(config)
        model.load_state_dict(load_safetensors(folder / WEIGHTS))
        comparison.check(f"{WEIGHTS} by timm", _logits_of(model, trained, comparison.images))


def _to_timm(trained: Trained, comparison: Comparison) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """``config.json``, weights by timm's names, and the name of timm's classifier.

    None where timm's model is not the same net: with normalised features, or with layers between pooling and classifier.
    """
    info, backbone = trained.info, trained.net.get_submodule("backbone")
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    classifier = cfg.get("classifier")
    if not isinstance(classifier, str) or getattr(trained.net, "l2_feature", False):
        return None
    pretrained = {
        **{k: cfg[k] for k in ("first_conv", "fixed_input_size", "min_input_size") if cfg.get(k) is not None},
        "input_size": [3, info.img_size, info.img_size],
        "num_classes": len(info.classes),
        "classifier": classifier,
        "custom_load": False,
        # as `predict` has images: stretched to the size, not cropped
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": info.mean * (3 // len(info.mean)),
        "std": info.std * (3 // len(info.std)),
    }
    config = {
        "architecture": info.net.removeprefix(TIMM).partition(".")[0],
        "num_classes": len(info.classes),
        "num_features": int(trained.net.num_features),  # type: ignore[arg-type]
        "label_names": info.classes,
        "model_args": {"img_size": info.img_size},
        "pretrained_cfg": pretrained,
    }
    try:
        model = _timm_model(config)
    except TypeError:  # a convolutional net, which takes any size
        del config["model_args"]
        model = _timm_model(config)
    weights = {}
    for name, tensor in trained.net.state_dict().items():
        part, _, rest = name.partition(".")
        if part in ("backbone", "classifier"):
            weights[rest if part == "backbone" else f"{classifier}.{rest}"] = tensor
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        return None
    return (config, weights, classifier) if comparison.same(_logits_of(model, trained, comparison.images)) else None


def _from_timm(weights: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Weights by this package's names."""
    head = f"{classifier}."
    return {
        f"classifier.{n.removeprefix(head)}" if n.startswith(head) else f"backbone.{n}": t for n, t in weights.items()
    }


def _timm_model(config: dict[str, Any]) -> nn.Module:
    """The model that a ``config.json`` describes, with random weights."""
    import timm

    arguments = config.get("model_args", {})
    return timm.create_model(config["architecture"], num_classes=config["num_classes"], **arguments).eval()


@torch.no_grad()
def _logits_of(model: nn.Module, trained: Trained, images: Tensor) -> Tensor:
    """(N, C) logits of timm's model for images prepared as for the net of the checkpoint."""
    return Classifier(trained, torch.device("cpu"), model)(images)


def _refuse_missing(format: str) -> None:
    if format not in _NEEDS:
        raise InputError(f"--format: {format!r} is none of {', '.join(_NEEDS)}, both")
    if missing := [p for p in _NEEDS[format] if find_spec(p) is None]:
        raise InputError(
            f"--format {format} needs {', '.join(missing)}, not installed here: pip install 'muscle-plugin[export]'"
        )
