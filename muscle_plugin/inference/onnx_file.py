"""``model.onnx``: a trained net with its normalisation, from uint8 images to probabilities."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from muscle_plugin.errors import ExportError
from muscle_plugin.inference.compare import Comparison
from muscle_plugin.inference.trained import Classifier, Trained
from muscle_plugin.text import first_line
from muscle_plugin.version import __version__


class ForONNX(nn.Module):
    """(N, 3, S, S) uint8 RGB to logits and probabilities, (N, C) each."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(images)
        return logits, logits.softmax(1)


def write_onnx(trained: Trained, path: Path, comparison: Comparison) -> None:
    """Write the file, run it by ONNX Runtime and compare. Folds the weights of the net in ``trained``.

    Raises:
        ExportError: torch cannot write the net, or what it wrote does not predict the same.
        OSError: the file cannot be written.
    """
    import onnx
    import onnxruntime

    _fold(trained.net)
    module = ForONNX(Classifier(trained, torch.device("cpu"))).eval()
    images = comparison.images
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)  # of one image, torch would fix the batch
    about = trained.info.model_dump(include={"classes", "img_size", "mean", "std"})
    properties = {**{k: json.dumps(v) for k, v in about.items()}, "net": trained.info.net, "muscle_plugin": __version__}
    try:
        with _quiet():
            model = onnx.load_model_from_string(_exported(module, example))
            onnx.helper.set_model_props(model, properties)
            onnx.checker.check_model(model)
            onnx.save(model, path)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as e:  # torch's exporters, onnx and its runtime raise what they meet
        raise ExportError(
            f"torch {torch.__version__} cannot write this net as ONNX: {first_line(e.__cause__ or e)}"
        ) from e

    def run(some: Tensor) -> list[Tensor]:
        outputs = session.run(["logits", "probabilities"], {"images": some.numpy()})
        return [torch.from_numpy(np.array(x)) for x in outputs]

    try:
        (logits, probabilities), (alone, _) = run(images), run(images[-1:])
    except Exception as e:  # onnxruntime's errors derive from Exception alone
        raise ExportError(f"{path.name} does not run on {len(images)} images: {first_line(e)}") from e
    comparison.check(f"{path.name} by onnxruntime {onnxruntime.__version__}", logits)
    comparison.check(f"{path.name} (one image at a time)", alone, -1)
    if not torch.allclose(probabilities, comparison.expected.softmax(1), atol=1e-3):
        raise ExportError(f"{path.name}: its probabilities are not the softmax of its logits")


def _exported(module: nn.Module, example: Tensor) -> bytes:
    """The ONNX file, for any number of images: by ``torch.export`` where this torch has it for ONNX, else by tracing."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits", "probabilities"]}
    takes_dynamo = "dynamo" in inspect.signature(torch.onnx.export).parameters
    if takes_dynamo and _version() >= (2, 6):
        shapes = {"images": {0: torch.export.Dim("batch")}}
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        assert program is not None
        return program.model_proto.SerializeToString()
    out = io.BytesIO()
    names |= {"dynamo": False} if takes_dynamo else {}
    batch = {n: {0: "batch"} for n in ("images", "logits", "probabilities")}
    torch.onnx.export(module, (example,), out, opset_version=17, dynamic_axes=batch, **names)  # type: ignore[call-overload]
    return out.getvalue()


def _version() -> tuple[int, ...]:
    return tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' remarks on their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _fold(net: nn.Module) -> None:
    """Replace weight norm and other parametrisations by plain weights."""
    for module in list(net.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
