"""A job's process: an ordinary client of the Tinker API, told what to do on standard input."""

from __future__ import annotations
