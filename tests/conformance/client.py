"""Drives one release of the tinker SDK, the one that PYTHONPATH selects, against the server at TINKER_BASE_URL.

Prints one JSON line per operation, ``{"operation", "verdict", "detail"}``, with the verdicts ``ok``, ``absent`` (this
release has no such call) and ``failed``, and ends without waiting for the SDK's background threads.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
import warnings

from operations.bridge import OPERATIONS, AbsentError, Client

IN_ORDER = ("training", "checkpoints", "sampling", "records")


def main() -> None:
    """Run all operations, each after what it needs."""
    # Older releases use what newer Pythons and libraries deprecate.
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(float(os.environ.get("CONFORMANCE_SECONDS", "120")), exit=True)
    for module in IN_ORDER:
        importlib.import_module(f"operations.{module}")
    import tinker

    wanted = os.environ["CONFORMANCE_RELEASE"]
    if tinker.__version__ != wanted:
        sys.exit(f"this is release {tinker.__version__} of the SDK, not {wanted}")
    client = Client()
    for name, function in OPERATIONS.items():
        verdict, detail = "ok", ""
        try:
            function(client)
        except AbsentError as error:
            verdict, detail = "absent", str(error)
        except Exception:
            verdict, detail = "failed", traceback.format_exc(limit=-4)
        sys.stdout.write(json.dumps({"operation": name, "verdict": verdict, "detail": detail}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
