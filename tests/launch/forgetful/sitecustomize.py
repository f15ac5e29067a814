"""A planted fault, for test_prove: with this folder in PYTHONPATH a rank that resumes forgets
Adam's first moment.
"""

import sys

if "hfscale.worker" in sys.orig_argv:
    from hfscale.checkpoint import manager

    load = manager.load_fragments

    def forgetful(reader, fragments):
        load(reader, fragments)
        for fragment in fragments:
            fragment.tensors["exp_avg"].zero_()

    manager.load_fragments = forgetful
