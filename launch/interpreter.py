"""How another Python process of ours is started: by a module's name, with nothing imported from the
folder where one stands.

``python -m`` puts the current directory before the standard library: a ``random.py`` there would be
everybody's. Python 3.11 has ``-P`` against that; this works with 3.10 as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
_RUN = """import sys
sys.path[:] = [entry for entry in sys.path if entry]
root, *sys.argv = sys.argv[1:]
if root not in sys.path:
    sys.path.insert(0, root)
from runpy import run_module
run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def python(module: str, *arguments: object, root: str = ROOT) -> list[str]:
    """Return the command that runs ``module`` of the code in ``root``, which is running now, in
    this interpreter.
    """
    return [sys.executable, "-c", _RUN, root, module, *map(str, arguments)]
