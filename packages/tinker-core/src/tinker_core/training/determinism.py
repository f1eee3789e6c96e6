"""Settings under which equal inputs give equal bits, in this process and in any later one on the same machine."""

from __future__ import annotations

import logging
import os

import torch

log = logging.getLogger(__name__)


def make_deterministic() -> None:
    """Choose reproducible kernels and a fixed number of threads; call it before CUDA starts.

    A kernel without a reproducible form raises `RuntimeError` from now on, which fails the request that needs it.
    """
    # Sums are split by threads, and what happens to be free must not decide how many; setting the number, even to what
    # it is, also keeps the matrix library from choosing fewer.
    torch.set_num_threads(torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1)
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    # Its backward has no reproducible form; the flash and memory-efficient kernels take theirs by the setting above.
    torch.backends.cuda.enable_cudnn_sdp(False)
    log.info(
        "deterministic: %d CPU threads, CUBLAS_WORKSPACE_CONFIG=%s, torch %s; equal bits need the same of all three",
        torch.get_num_threads(),
        os.environ["CUBLAS_WORKSPACE_CONFIG"],
        torch.__version__,
    )
