"""The protobuf schema of the wire, and the code generated from it."""

from __future__ import annotations
