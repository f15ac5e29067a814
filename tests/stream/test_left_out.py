"""The ledger of rows left out, and a stream that has one: the same for any ranks."""

from __future__ import annotations

import numpy as np

from hfscale.stream.left_out import LeftOut, merged


def test_spans_are_merged_and_asked() -> None:
    assert merged([(5, 6), (1, 3), (3, 4), [2, 3], (9, 9)]) == [(1, 4), (5, 6)]
    ledger = LeftOut([(1, 4), (5, 6), (100, 200)])
    assert ledger.mask(np.arange(7)).tolist() == [False, True, True, True, False, True, False]
    assert ledger.mask(np.array([99, 100, 199, 200])).tolist() == [False, True, True, False]
    assert [ledger.count(0, 7), ledger.count(3, 150), ledger.count(6, 100)] == [4, 52, 0]
    assert not LeftOut() and LeftOut().mask(np.arange(3)).sum() == 0
