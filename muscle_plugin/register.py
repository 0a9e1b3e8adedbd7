"""``import muscle_plugin.register`` makes USB know every algorithm and net of this package.

After it, ``semilearn.get_algorithm`` builds this package's algorithms, ``muscle`` and ``muscle_<name>``, and
``semilearn.get_net_builder`` this package's nets. Nothing of USB's own is replaced.

Raises:
    RuntimeError: USB, or another plugin, already has one of these names.
"""

from __future__ import annotations

from muscle_plugin.algorithms.compose import algorithm_class
from muscle_plugin.nets import OWN_NETS
from muscle_plugin.registry import plugins
from muscle_plugin.registry.catalogue import OWN_ALGORITHMS, muscle_algorithms
from muscle_plugin.usb.names import ALGORITHMS, nets


def register_all() -> None:
    """Register what is not yet registered; called again after a plugin is loaded."""
    for name in (*OWN_ALGORITHMS, *muscle_algorithms()):
        cls = algorithm_class(name)
        if name not in ALGORITHMS:
            ALGORITHMS[name] = cls
        _refuse_another("an algorithm", name, ALGORITHMS[name], cls)
    for name, builder in OWN_NETS.items():  # USB's `get_net_builder` looks into its module `nets`
        _refuse_another("a net", name, vars(nets).setdefault(name, builder), builder)


def _refuse_another(kind: str, name: str, present: object, own: object) -> None:
    if present is not own:
        raise RuntimeError(f"USB already has {kind} {name!r}: {present}; muscle_plugin cannot add its own")


register_all()
plugins.after_loading.append(register_all)
