"""``python -m muscle_plugin.cli``."""

import sys

from muscle_plugin.cli import main

sys.exit(main())
