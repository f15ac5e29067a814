"""A planted fault, for test_prove: with this folder in PYTHONPATH a rank that resumes forgets
Adam's first moment.
"""

import sys

if "hfscale.worker" in sys.orig_argv:
    from hfscale.checkpoint import filling

    load = filling.load_fragments

    def forgetful(reader, fragments):
        load(reader, fragments)
        for fragment in fragments:
            fragment.tensors["exp_avg"].zero_()

    filling.load_fragments = forgetful
