"""``model.onnx``: a trained net with its normalisation, from uint8 images to probabilities."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from muscle_plugin.errors import ExportError
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


def write_onnx(trained: Trained, path: Path, images: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Write the file; return a function that runs it, from images to logits and probabilities.

    It turns weight norm and other parametrisations of the net in ``trained`` into plain weights.

    Raises:
        ExportError: torch cannot write the net, or ONNX Runtime cannot run what it wrote.
        OSError: the file cannot be written.
    """
    import onnx
    import onnxruntime

    for module in list(trained.net.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name)
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)  # of one image, torch would fix the batch
    about = trained.info.model_dump(include={"classes", "img_size", "mean", "std"})
    properties = {**{k: json.dumps(v) for k, v in about.items()}, "net": trained.info.net, "muscle_plugin": __version__}
    try:
        with _quiet():
            classifier = Classifier(trained, torch.device("cpu"))
            model = onnx.load_model_from_string(_exported(ForONNX(classifier).eval(), example))
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

    def run(some: Tensor) -> tuple[Tensor, Tensor]:
        try:
            logits, probabilities = session.run(["logits", "probabilities"], {"images": some.numpy()})
        except Exception as e:  # onnxruntime's errors derive from Exception alone
            raise ExportError(f"{path.name} does not run on {len(some)} images: {first_line(e)}") from e
        return torch.from_numpy(np.array(logits)), torch.from_numpy(np.array(probabilities))

    return run


def _exported(module: nn.Module, example: Tensor) -> bytes:
    """The ONNX file, for any number of images: by ``torch.export`` where this torch has it for ONNX, else by tracing."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits", "probabilities"]}
    if _version() >= (2, 6):
        shapes = {"images": {0: torch.export.Dim("batch")}}
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        assert program is not None
        return program.model_proto.SerializeToString()
    out = io.BytesIO()
    batch = {n: {0: "batch"} for n in ("images", "logits", "probabilities")}
    torch.onnx.export(module, (example,), out, opset_version=17, dynamic_axes=batch, **names)  # type: ignore[call-overload]
    return out.getvalue()


def _version() -> tuple[int, ...]:
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


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
