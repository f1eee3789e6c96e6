"""``python -m tinker_server``."""

from __future__ import annotations

import sys

from tinker_server.cli import main

sys.exit(main())
