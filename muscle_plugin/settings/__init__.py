"""Settings: defaults, YAML files (layered by ``extends``) and the command line, checked together.

schema        every setting with its type, bounds, default, help, and what it affects
sources       YAML files, and the configurations that come with this package
checks        faults that concern more than one setting
resolve       layers of settings, merged and checked
command_line  settings as flags
namespace     USB's settings, read as a layer, and written for its classes
"""

from muscle_plugin.settings.resolve import Resolved, load_settings
from muscle_plugin.settings.sources import config_directory, config_names

__all__ = ["Resolved", "config_directory", "config_names", "load_settings"]
