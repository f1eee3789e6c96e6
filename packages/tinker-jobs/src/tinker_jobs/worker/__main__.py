"""``python -m tinker_jobs.worker``: runs one job."""

from __future__ import annotations

import sys

from tinker_jobs.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
