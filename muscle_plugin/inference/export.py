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

from muscle_plugin.errors import ExportError, InputError
from muscle_plugin.files import as_shared_as_any, load_safetensors, read_json, refuse_existing, write_json, writing
from muscle_plugin.inference.compare import Comparison, images_of_the_run, read_images
from muscle_plugin.inference.onnx_file import write_onnx
from muscle_plugin.inference.predict import Predictor
from muscle_plugin.inference.timm_form import from_timm, logits_of, timm_model, to_timm
from muscle_plugin.inference.trained import Trained, read_trained, rebuild
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
    refuse_existing(out, "choose another folder")
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"--tolerance: must be 0 or more, got {tolerance}")
    used = checkpoint_of(Path(checkpoint))
    trained = read_trained(used)
    size = trained.img_size
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
        f"{trained.name} of {used} ({trained.kind} weights, step {trained.step}, {len(trained.classes)} classes): {out}",
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
        weights = from_timm(weights, str(own.get("timm_classifier")))
    return Predictor(rebuild({**own, "it": own.get("step"), "ema_model": weights, "images": own}, folder), device)


def _write_safetensors(trained: Trained, folder: Path, comparison: Comparison) -> None:
    from safetensors.torch import save_file

    own = {
        "format": FORMAT,
        "version": __version__,
        "load": "muscle_plugin.load_exported(FOLDER)",
        "net": trained.name,
        "net_from_name": trained.from_torchvision,
        "net_options": trained.options,
        "layout": "muscle_plugin",
        **{k: getattr(trained, k) for k in ("classes", "img_size", "channels", "mean", "std", "algorithm", "dataset")},
        "weights": trained.kind,
        "step": trained.step,
    }
    config: dict[str, Any] = {"architecture": trained.name, "num_classes": len(trained.classes)}
    config |= {"label_names": trained.classes}
    weights = trained.net.state_dict()
    as_timm = to_timm(trained, comparison) if trained.name.startswith(TIMM) else None
    if as_timm is not None:
        config, weights, classifier = as_timm
        own |= {"layout": "timm", "timm_classifier": classifier}
    # no two tensors may share memory in such a file
    whole = {n: t.detach().clone().contiguous() for n, t in weights.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    as_shared_as_any(folder / WEIGHTS)  # the library makes it readable by its owner alone
    write_json(folder / CONFIG, {**config, OURS: own})
    comparison.check(f"{WEIGHTS} by load_exported", load_exported(folder, "cpu").logits(comparison.images))
    if as_timm is not None:
        model = timm_model(config)
        model.load_state_dict(load_safetensors(folder / WEIGHTS))
        comparison.check(f"{WEIGHTS} by timm", logits_of(model, trained, comparison.images))


def _refuse_missing(format: str) -> None:
    if format not in _NEEDS:
        raise InputError(f"--format: {format!r} is none of {', '.join(_NEEDS)}, both")
    if missing := [p for p in _NEEDS[format] if find_spec(p) is None]:
        raise InputError(
            f"--format {format} needs {', '.join(missing)}, not installed here: pip install 'muscle-plugin[export]'"
        )
