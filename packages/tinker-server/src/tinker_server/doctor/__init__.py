"""What ``tinker-server doctor`` looks at: each check is a function that returns findings and changes nothing."""

from __future__ import annotations
