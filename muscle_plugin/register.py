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
from muscle_plugin.usb.names import register_algorithm, register_net


def register_all() -> None:
    """Register what is not yet registered; called again after a plugin is loaded."""
    for name in (*OWN_ALGORITHMS, *muscle_algorithms()):
        register_algorithm(name, algorithm_class(name))
    for name, builder in OWN_NETS.items():
        register_net(name, builder)


register_all()
plugins.after_loading.append(register_all)
