"""Whole matrices, for a moment, of what ZeRO has cut: each is put together on one rank, changed
there, and given back to those who hold it.

Every rank knows of every matrix which ranks hold which range. Matrices are dealt to ranks by the
work that they make, each to one that holds some of it (at stages 1 and 2 mostly the only one, so
that nothing is sent; at stage 0 everybody holds all). Ranges travel in one all-to-all each way.

Legend: a flat is what the optimizer holds as one tensor: a parameter at stage 0, a partition of
many of them above. W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from hfscale.dist.agree import from_all_ranks
from hfscale.dist.group import host_group
from hfscale.dist.world import Place
from hfscale.engine.fragments import Fragment


@dataclass(frozen=True)
class Piece:
    """A range of a flattened matrix, on one rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: int  # its number: the same on all ranks
    offset: int  # in that


@dataclass(frozen=True)
class Matrix:
    """A matrix, the rank that works on it, and who holds what of it."""

    name: str
    shape: tuple[int, ...]
    owner: int
    held: dict[int, Piece]  # by rank


@dataclass(frozen=True)
class Traffic:
    """What one rank sends and gets for some flats: matrices, by the other rank."""

    mine: list[Matrix]  # that it works on
    gives: list[list[Matrix]]  # to their owner, of which it gives a range
    gets: list[list[Matrix]]  # its own, of which it gets one
    returns: list[list[Matrix]]  # its own, that another holds
    takes: list[list[Matrix]]  # from their owner, that it holds


class Matrices:
    """The matrices of some flats."""

    def __init__(
        self,
        fragments: Sequence[Fragment],
        flats: Sequence[Tensor],
        *,
        place: Place,
        replicated: bool,
    ) -> None:
        """``fragments`` are this rank's of the matrices, in ``flats``; ``replicated``: every rank
        holds all. Collective.
        """
        self._place, self._replicated = place, replicated
        self._numbers = {flat: number for number, flat in enumerate(flats)}
        own = [asdict(piece) for piece in _pieces(fragments, flats)]
        self._pieces = [[_piece(one) for one in said] for said in from_all_ranks(own)]
        self._traffic: dict[tuple[int, ...], Traffic] = {}

    def replace(
        self, flats: Sequence[Tensor], values: Sequence[Tensor], *, by: Callable[[Tensor], Tensor]
    ) -> None:
        """Put in place of ``values``, cut as ``flats`` are, what ``by`` makes of each whole matrix
        (of its shape). Collective: all ranks call it for the same flats.
        """
        numbers = tuple(self._numbers[flat] for flat in flats)
        if numbers not in self._traffic:
            self._traffic[numbers] = self._plan(numbers)
        traffic, rank = self._traffic[numbers], self._place.rank
        at = dict(zip(numbers, (value.view(-1) for value in values), strict=True))

        sent = [[_view(at, one.held[rank]) for one in to] for to in traffic.gives]
        sizes = [[one.held[of].numel for one in ours] for of, ours in enumerate(traffic.gets)]
        given = self._exchange(sent, sizes, like=values[0])
        wholes = _put_together(traffic, given)
        done = {one.name: by(whole).reshape(-1) for one, whole in wholes}

        sent = [
            [_range(done[one.name], one.held[to]) for one in ours]
            for to, ours in enumerate(traffic.returns)
        ]
        sizes = [[one.held[rank].numel for one in of] for of in traffic.takes]
        back = self._exchange(sent, sizes, like=values[0])
        for theirs, parts in zip(traffic.takes, back, strict=True):
            for one, part in zip(theirs, parts, strict=True):
                _view(at, one.held[rank]).copy_(part)

    def _exchange(
        self, sent: list[list[Tensor]], sizes: list[list[int]], *, like: Tensor
    ) -> list[list[Tensor]]:
        """Return what each rank sends this one, cut to ``sizes``. Collective."""
        if self._place.size == 1:
            return sent
        here = torch.cat([like.new_empty(0), *chain.from_iterable(sent)])
        going = [sum(part.numel() for part in parts) for parts in sent]
        coming = [sum(of) for of in sizes]
        there = like.new_empty(sum(coming))
        torch_dist.all_to_all_single(
            there,
            here,
            output_split_sizes=coming,
            input_split_sizes=going,
            group=None if like.is_cuda else host_group(),
        )
        parts = iter(there.split([*chain.from_iterable(sizes)]))
        return [[next(parts) for _ in of] for of in sizes]

    def _plan(self, numbers: tuple[int, ...]) -> Traffic:
        rank = self._place.rank
        by_owner: list[list[Matrix]] = [[] for _ in range(self._place.size)]
        for one in self._deal(numbers):
            by_owner[one.owner].append(one)
        mine = by_owner[rank]
        traffic = Traffic(mine, [], [], [], [])
        for other, theirs in enumerate(by_owner):
            traffic.gives.append([one for one in theirs if rank in self._givers(one)])
            traffic.gets.append([one for one in mine if other in self._givers(one)])
            traffic.returns.append([one for one in mine if other in one.held])
            traffic.takes.append([one for one in theirs if rank in one.held])
        return traffic

    def _givers(self, matrix: Matrix) -> Collection[int]:
        """Return whose ranges make the matrix whole."""
        return [matrix.owner] if self._replicated else matrix.held

    def _deal(self, numbers: tuple[int, ...]) -> Iterator[Matrix]:
        """Yield the matrices in some flats, each with the least busy of the ranks that hold it."""
        held = dict[str, dict[int, Piece]]()
        for rank, pieces in enumerate(self._pieces):
            for piece in pieces:
                if piece.flat in numbers:
                    held.setdefault(piece.name, {})[rank] = piece
        busy = [0] * self._place.size
        shapes = {name: next(iter(ranks.values())).shape for name, ranks in held.items()}
        for name in sorted(held, key=lambda name: (-_work(shapes[name]), name)):
            owner = min(held[name], key=lambda rank: (busy[rank], rank))
            busy[owner] += _work(shapes[name])
            yield Matrix(name, shapes[name], owner, held[name])


def _put_together(
    traffic: Traffic, given: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield each matrix of this rank, whole, of the ranges ``given`` by each rank."""
    parts = dict[str, list[tuple[Piece, Tensor]]]()
    for of, (ours, ranges) in enumerate(zip(traffic.gets, given, strict=True)):
        for one, part in zip(ours, ranges, strict=True):
            parts.setdefault(one.name, []).append((one.held[of], part))
    for one in traffic.mine:
        whole = parts[one.name][0][1].new_empty(prod(one.shape))
        for piece, part in parts[one.name]:
            _range(whole, piece).copy_(part)
        yield one, whole.view(one.shape)


def _work(shape: tuple[int, ...]) -> int:
    """Return what matrices of a shape cost, up to a factor: products of (A, B) and (B, A)."""
    return prod(shape) * min(shape[-2:])


def _piece(said: dict[str, Any]) -> Piece:
    return Piece(**{**said, "shape": tuple(said["shape"])})


def _pieces(fragments: Sequence[Fragment], flats: Sequence[Tensor]) -> Iterator[Piece]:
    places = [
        (number, flat.untyped_storage().data_ptr(), int(flat.storage_offset()), flat.numel())
        for number, flat in enumerate(flats)
    ]
    for fragment in fragments:
        weight = fragment.tensors["weight"]
        storage, begin = weight.untyped_storage().data_ptr(), int(weight.storage_offset())
        for number, of_flat, first, numel in places:
            if storage == of_flat and first <= begin < first + numel:
                yield Piece(
                    fragment.name,
                    fragment.shape,
                    fragment.start,
                    fragment.numel,
                    number,
                    begin - first,
                )


def _view(at: dict[int, Tensor], piece: Piece) -> Tensor:
    return at[piece.flat].narrow(0, piece.offset, piece.numel)


def _range(whole: Tensor, piece: Piece) -> Tensor:
    return whole.narrow(0, piece.start, piece.numel)
