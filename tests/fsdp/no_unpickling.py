"""A plugin under whose watch no process can unpickle an object of any class, not even inside a library."""

from __future__ import annotations

import sys


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        raise RuntimeError(f"something unpickles {arguments}")


sys.addaudithook(_refuse)
