"""Makes the class of an algorithm from its name: ``Host`` over a USB class, with ``Muscle`` in front for ``muscle_*``."""

from __future__ import annotations

from functools import cache

from muscle_plugin.algorithms.contrastive import Contrastive
from muscle_plugin.algorithms.fitted import ClassMean, LinearProbe
from muscle_plugin.algorithms.label_propagation import LabelPropagation, MeanTeacherLabelPropagation
from muscle_plugin.algorithms.mean_teacher import MeanTeacher, OriginalMeanTeacher
from muscle_plugin.algorithms.muscle import Muscle
from muscle_plugin.registry.catalogue import OWN_ALGORITHMS, Argument, muscle_algorithms
from muscle_plugin.settings.schema import MuscleSettings
from muscle_plugin.training import Host
from muscle_plugin.usb.names import ALGORITHMS, AlgorithmBase, SSL_Argument, str2bool

#: This package's classes by name. Settings are in ``OWN_ALGORITHMS``, but of what replaces a class of USB's.
OWN: dict[str, type[AlgorithmBase]] = {
    "meanteacher": MeanTeacher,  # a version of USB has a broken one
    "meanteacher_original": OriginalMeanTeacher,
    "labelprop": LabelPropagation,
    "meanteacher_labelprop": MeanTeacherLabelPropagation,
    "contrastive": Contrastive,
    "linear_probe": LinearProbe,
    "class_mean": ClassMean,
}
_MUSCLE_ARGUMENTS = [
    Argument(n, type(f.default), f.default, f.description or "") for n, f in MuscleSettings.model_fields.items()
]


def algorithm_class(name: str) -> type[Host]:
    """The trainable class of an algorithm: any of USB's registry or this package's, ``muscle``, or ``muscle_<name>``; a
    KeyError if there is none."""
    ALGORITHMS.keys()  # a USB that loads plugins does so now: it asks for these classes itself
    return _made(name)


@cache
def _made(name: str) -> type[Host]:
    composed = muscle_algorithms()
    with_muscle = name in composed
    usb_name = composed[name].name if with_muscle else name
    base = OWN.get(usb_name) or ALGORITHMS[usb_name]
    own = OWN_ALGORITHMS[usb_name].arguments if usb_name in OWN_ALGORITHMS else ()
    added = [*own, *(_MUSCLE_ARGUMENTS if with_muscle else ())]

    def get_argument() -> list[SSL_Argument]:
        of_usb = ((f"--{a.name}", str2bool if a.type is bool else a.type, a.default, a.help) for a in added)
        return [*base.get_argument(), *(SSL_Argument(*a) for a in of_usb)]

    members = {
        "usb_name": usb_name,
        "__doc__": f"MUSCLE composed with {usb_name}." if with_muscle else base.__doc__,
        "get_argument": staticmethod(get_argument),
    }
    if with_muscle:
        return type(f"Muscle{base.__name__}", (Muscle, Host, base), members)
    return type(f"Hosted{base.__name__}", (Host, base), members)
