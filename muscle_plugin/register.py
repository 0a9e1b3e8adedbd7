"""``import muscle_plugin.register`` makes USB know every algorithm and net of this package.

After it, ``semilearn.get_algorithm`` builds this package's algorithms, ``muscle`` and ``muscle_<name>``, and
``semilearn.get_net_builder`` this package's nets. Nothing of USB's own is replaced. This is the only file that touches
USB's registries.

Raises:
    RuntimeError: USB, or another plugin, already has one of these names.
"""

from __future__ import annotations

from muscle_plugin.algorithms.compose import algorithm_class
from muscle_plugin.nets import OWN_NETS
from muscle_plugin.registry import plugins
from muscle_plugin.registry.catalogue import muscle_algorithms
from muscle_plugin.registry.own import OWN_ALGORITHMS
from muscle_plugin.usb.names import ALGORITHMS, nets


def register_all() -> None:
    """Register what is not yet; called again when a plugin was loaded."""
    for name in (*OWN_ALGORITHMS, *muscle_algorithms()):
        cls = algorithm_class(name)
        if name not in ALGORITHMS:
            ALGORITHMS[name] = cls
        elif ALGORITHMS[name] is not cls:
            raise RuntimeError(
                f"USB already has an algorithm {name!r}: {ALGORITHMS[name]}; muscle_plugin cannot add its own"
            )
    for name, builder in OWN_NETS.items():
        present = getattr(nets, name, builder)
        if present is not builder:
            raise RuntimeError(f"USB already has a net {name!r}: {present}; muscle_plugin cannot add its own")
        setattr(nets, name, builder)


register_all()
plugins.after_loading.append(register_all)
