"""A child process that does not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> Callable[[], None]:
    """What a child calls first, to be ended by Linux when its parent thread is gone; elsewhere a no-op.

    It fits as a `preexec_fn`, and does nothing between fork and exec that could wait for a lock.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def ask() -> None:
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent_pid:  # the parent died before the request reached the kernel
                os._exit(1)

    return ask
