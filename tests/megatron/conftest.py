from __future__ import annotations

from tinker_backend_megatron.quiet import import_megatron_core

# Warnings are errors here, also those of an import; tests import modules that use Megatron-Core in any order.
import_megatron_core()
