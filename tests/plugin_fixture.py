"""A fixture that forgets what plugins registered, so that no other test sees it."""

import sys

import pytest


@pytest.fixture
def plugins_forgotten():
    import muscle_plugin.register  # noqa: F401
    from muscle_plugin.algorithms.compose import _made, algorithm_class
    from muscle_plugin.registry import plugins
    from muscle_plugin.registry.catalogue import PLUGIN_ALGORITHMS
    from muscle_plugin.registry.names import DATASETS, PLUGIN_DATASETS, PLUGIN_NETS
    from muscle_plugin.usb.names import ALGORITHMS

    tables = (ALGORITHMS._dict, PLUGIN_ALGORITHMS, PLUGIN_DATASETS, PLUGIN_NETS, DATASETS)
    kept = [dict(t) for t in tables]
    loaded, modules = set(plugins._loaded), set(sys.modules)
    yield
    for table, content in zip(tables, kept, strict=True):
        table.clear()
        table.update(content)
    plugins._loaded.clear()
    plugins._loaded.update(loaded)
    for name in set(sys.modules) - modules:
        if name.startswith("_muscle_plugin_of_"):
            del sys.modules[name]
    _made.cache_clear()  # anew, the classes would not be those that USB's registry holds
    for name in ALGORITHMS._dict:
        if hasattr(ALGORITHMS[name], "usb_name"):
            ALGORITHMS._dict[name] = algorithm_class(name)
