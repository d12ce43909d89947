"""Runs a program that ends with its parent: `python tether.py PARENT_PID PROGRAM ARGUMENTS...`.

The kernel sends SIGKILL to the program when the process that started it is gone, however that one ended. The request
(PR_SET_PDEATHSIG, Linux) survives exec, so the program runs in this very process. It is made here and not between fork
and exec, because Python code must not run there in a parent that has threads. Elsewhere than on Linux nothing is asked.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks for the signal, then becomes the program."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before the request
            sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
