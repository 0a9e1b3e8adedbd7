"""Settings: defaults, YAML files (layered by ``extends``) and the command line, checked together."""

from muscle_plugin.settings.resolve import Resolved, load_settings
from muscle_plugin.settings.sources import config_directory, config_names

__all__ = ["Resolved", "config_directory", "config_names", "load_settings"]
