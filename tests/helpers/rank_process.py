"""One rank of ``tests.helpers.ranks``: joins the gloo group, then answers calls until its pipe
closes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve calls that arrive as ``(module:function, args, kwargs)``."""
    # a killed test session leaves no ranks behind
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable()
    # not a signal that a trainer listens to
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    pipe = Connection(int(sys.argv[1]))

    import torch

    from hfscale.dist.group import start
    from hfscale.dist.world import World

    torch.set_num_threads(1)
    start(World.from_environment())
    pipe.send_bytes(pickle.dumps((True, None)))  # ready
    while True:
        try:
            address, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            module, _, name = address.partition(":")
            target = import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            answer = pickle.dumps((True, target(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        sys.stdout.flush()
        pipe.send_bytes(answer)


if __name__ == "__main__":
    main()
