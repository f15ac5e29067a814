"""A signal sets a flag and nothing else."""

import os
import signal

from hfscale.dist.stop import SIGNALS, StopRequest


def test_each_signal_is_remembered_by_name():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            stop = StopRequest().listen()
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested and stop.reason == signal.Signals(number).name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
