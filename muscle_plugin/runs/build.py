"""The algorithm object of resolved settings, ready to train."""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import muscle_plugin.register  # noqa: F401  USB's classes look each other up by name
from muscle_plugin.algorithms.compose import algorithm_class
from muscle_plugin.data.load import load_data
from muscle_plugin.data.source import Source
from muscle_plugin.device import memory_for
from muscle_plugin.errors import InputError, UserError
from muscle_plugin.nets.build import builder_of
from muscle_plugin.runs.logs import output_to
from muscle_plugin.settings.resolve import Resolved
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.training import Host

#: Within it, memory that runs out is a :class:`DeviceError` that says what needs less.
room_for_images_and_nets = partial(memory_for, "the images and nets", "--data_on host, a smaller --net or --img_size")


def build(resolved: Resolved, logger: logging.Logger | None = None, source: Source | None = None) -> Host:
    """Build the algorithm object; nothing is written to disk. ``source`` takes the place of the data set's files."""
    settings, args = resolved.settings, Namespace(resolved=resolved, source=source)
    with room_for_images_and_nets(), _faults_of_usb(settings), output_to(logger):
        return algorithm_class(settings.algorithm)(args, builder_of(settings), None, logger)


def pack_images(resolved: Resolved, logger: logging.Logger | None) -> None:
    """Write the array files of a data set, which the processes of a machine share."""
    with room_for_images_and_nets(), output_to(logger):
        load_data(resolved.settings)


@contextlib.contextmanager
def _faults_of_usb(settings: RunSettings) -> Iterator[None]:
    """What USB's classes, and the packages they import, refuse, as errors of the input."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as e:
        raise InputError(f"{settings.algorithm} needs {e.name}, which is not installed: pip install {e.name}") from e
    except NotImplementedError as e:
        what = f"{settings.algorithm} cannot be built over net {settings.net} on {settings.dataset}"
        raise InputError(f"{what}: USB's class does not support it; see the README's table of algorithms") from e
    except ValueError as e:
        raise InputError(str(e)) from e
