"""Where the `hfscale` script begins: a Ctrl-C while Python imports ends it without a word, not with
a traceback.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run one command line."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `launch.cli` listens
    from launch.cli import main as run

    run()


if __name__ == "__main__":
    main()
