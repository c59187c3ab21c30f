"""Probabilities of a few rows at every declared temperature, in as few passes over the vocabulary as can be.

One softmax per temperature, and one for both where one temperature is twice the other: ``p_t`` is then ``p_2t`` squared,
over the sum of squares. Sums are kept per block of the vocabulary. A block whose whole mass lies below the floors holds no
entry that reaches them, so only the other blocks are looked at entry by entry; and a draw finds its block first and its
entry there.

Axes: ``C`` rows, ``V`` vocabulary, ``G`` blocks of the vocabulary, ``W`` entries of a block, ``B`` temperatures, ``n`` blocks
looked at.
"""

from __future__ import annotations

import torch

# Entries of a block: few enough to go through at every draw, blocks few enough to go through for every row.
_NARROW, _WIDE, _SMALL = 32, 128, 1 << 15
# An entry this close to certain is kept: rounding of the cumulated sum could otherwise draw it twice.
CERTAIN = 1.0 - 2.0**-10
# Share of blocks from which on every block is looked at.
_MOST = 0.2


class Workspace:
    """Memory for the probabilities of one block of rows after the other.

    Arrays of some megabytes that come and go with every block are handed back to the system each time on Linux; touching
    their pages anew takes longer than all that is computed in them.
    """

    def __init__(self) -> None:
        self._held: dict[object, torch.Tensor] = {}

    def take(self, key: object, like: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        """``[rows, width]`` of anything, valid until ``key`` is taken again."""
        held = self._held.get(key)
        if held is None or held.shape[1] != width or len(held) < rows:
            held = self._held[key] = like.new_empty(rows, width)
        return held[:rows]


class Masses:
    """Probabilities of rows, which can be taken out one by one.

    Args:
        logits_CV: float32.
        temperatures: ascending.
        workspace: what holds the probabilities, for as long as these are used.
    """

    def __init__(self, logits_CV: torch.Tensor, temperatures: tuple[float, ...], workspace: Workspace) -> None:
        self.temperatures, self._workspace = temperatures, workspace
        self.rows, self.vocabulary = logits_CV.shape
        self.width = _NARROW if self.vocabulary <= _SMALL else _WIDE
        self.blocks = -(-self.vocabulary // self.width)
        top = temperatures[-1]
        # The likeliest entries at one temperature are those at every other, so the broadest alone tells where to look.
        self.squared = temperatures == (top / 2, top)
        self._p_CV = [self._softmax(logits_CV, t) for t in ((top,) if self.squared else temperatures)]
        # Sums per block, as they are first asked for: every pass over all probabilities counts.
        self._sums_CG: dict[int, torch.Tensor] = {}
        self._squares_CG: torch.Tensor | None = None
        self._square_C: torch.Tensor | None = None
        if self.squared:
            self._squares_CG = torch.linalg.vector_norm(self._blocks(0), dim=2).square()
            self._square_C = self._squares_CG.sum(dim=1)

    def _blocks(self, index: int) -> torch.Tensor:
        """``[C, G, W]`` probabilities of one array."""
        return self._p_CV[index].view(self.rows, self.blocks, self.width)

    def _softmax(self, logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
        """Probabilities, with columns of 0 up to a whole number of blocks."""
        width = self.blocks * self.width
        p_CV = self._workspace.take(temperature, logits_CV, self.rows, width)
        if temperature == 1.0 and width == self.vocabulary:
            return _softmax_into(p_CV, logits_CV)
        scaled = self._workspace.take("scaled", logits_CV, self.rows, width)
        if width > self.vocabulary:
            scaled[:, self.vocabulary :] = -torch.inf
        torch.mul(logits_CV, 1.0 / temperature, out=scaled[:, : self.vocabulary])
        return _softmax_into(p_CV, scaled)

    def of(self, rows: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        """Probability of single entries, per temperature."""
        found = [p[rows, ids] for p in self._p_CV]
        if self._square_C is not None:
            found.insert(0, found[0].square() / self._square_C[rows])
        return found

    def reach(self, floors: tuple[float, ...], blocks: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """The largest of ``p_b / floor_b`` over the temperatures, for every entry.

        Args:
            floors: one per temperature.
            blocks: rows and numbers of the blocks wanted (``[n, W]``); None for all (``[C, G, W]``, until the next call).
        """
        values = [self._blocks(i) for i in range(len(self._p_CV))]
        if blocks is None:
            # The scaled logits have become probabilities by now.
            out = self._workspace.take("scaled", values[0], self.rows, self.blocks * self.width).view_as(values[0])
        else:
            values, out = [v[blocks] for v in values], None
        if self._square_C is not None:
            # max(p^2 / (S floor_0), p / floor_1) = p max(p / (S floor_0), 1 / floor_1)
            factor = 1.0 / (self._square_C * floors[0])
            factor = factor[:, None, None] if blocks is None else factor[blocks[0]][:, None]
            return torch.mul(values[0], factor, out=out).clamp_(min=1.0 / floors[1]).mul_(values[0])
        reach = torch.mul(values[0], 1.0 / floors[0], out=out)
        for p, floor in zip(values[1:], floors[1:], strict=True):
            torch.maximum(reach, p * (1.0 / floor), out=reach)
        return reach

    def block_sums(self) -> torch.Tensor:
        """``[C, G]`` mass of every block at the largest temperature."""
        last = len(self._p_CV) - 1
        if last not in self._sums_CG:
            self._sums_CG[last] = self._blocks(last).sum(dim=2)
        return self._sums_CG[last]

    def simple_below(self, floors: tuple[float, ...]) -> torch.Tensor | float:
        """A block of less mass than this at the largest temperature has no entry that reaches its floor there, nor one
        that another temperature would include more likely: ``[C, 1]``, or one number for all rows."""
        if self._square_C is not None:
            return (self._square_C * (floors[0] / floors[1])).clamp(max=0.99 * floors[1])[:, None]
        return 0.99 * floors[0] if len(floors) == 1 else -1.0

    def take_out(self, rows: torch.Tensor, ids: torch.Tensor) -> None:
        """Entries that are kept: from now on they have no mass."""
        for p in self._p_CV:
            p[rows, ids] = 0.0
        changed = rows, ids // self.width
        for index, sums_CG in self._sums_CG.items():
            sums_CG[changed] = self._blocks(index)[changed].sum(dim=1)
        if self._squares_CG is not None:
            self._squares_CG[changed] = self._blocks(0)[changed].square().sum(dim=1)

    def left(self) -> torch.Tensor:
        """``[C, B]`` mass that has not been taken out, summed and not subtracted: a small rest would drown in a difference."""
        left = [self._sums_CG[i].sum(dim=1) if i in self._sums_CG else p.sum(dim=1) for i, p in enumerate(self._p_CV)]
        if self._squares_CG is not None and self._square_C is not None:
            left.insert(0, self._squares_CG.sum(dim=1) / self._square_C)
        return torch.stack(left, dim=1)

    def log_largest_at_one(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
        """Log-probability of single entries at T = 1, where that is declared. Only for entries of some size."""
        if 1.0 not in self.temperatures:
            return None
        return self.of(rows, ids)[self.temperatures.index(1.0)].log()

    def full(self, index: int) -> torch.Tensor:
        """``[C, V]`` probabilities at one temperature that has an array of its own."""
        return self._p_CV[index][:, : self.vocabulary]


class Inclusion:
    """Inclusion probabilities ``max_b p_b / floor_b`` of rows, block by block.

    Args:
        masses: of the rows.
        floors: one per temperature.
    """

    def __init__(self, masses: Masses, floors: tuple[float, ...]) -> None:
        self._masses, self._floors = masses, floors
        sums_CG = masses.block_sums()
        looked_CG = sums_CG > masses.simple_below(floors)
        if float(looked_CG.float().mean()) > _MOST:
            # Where most blocks have to be looked at, all are: gathering would cost more.
            self._included_CG = masses.reach(floors).sum(dim=2)
        else:
            self._included_CG = sums_CG * (1.0 / floors[-1])
            row_n, block_n = looked_CG.nonzero(as_tuple=True)
            self._included_CG[row_n, block_n] = masses.reach(floors, (row_n, block_n)).sum(dim=1)

    def at_least(self, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and ids of entries that are included with this probability or a larger one, ids rising within a row."""
        row_n, block_n = (self._included_CG >= bound).nonzero(as_tuple=True)
        place_H, column_H = (self._masses.reach(self._floors, (row_n, block_n)) >= bound).nonzero(as_tuple=True)
        return row_n[place_H], block_n[place_H] * self._masses.width + column_H

    def draw(
        self, uniform_C: torch.Tensor, changed: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and ids drawn with these probabilities (below 1), ids rising within a row.

        Points one apart, shifted by the row's uniform number, are placed along the cumulated probabilities; an entry is
        drawn when a point falls on it. Every row draws the floor or the ceiling of its total.

        Args:
            uniform_C: float64 in [0, 1).
            changed: rows and ids that have been taken out since.
        """
        included_CG, changed_blocks = self._included_CG.clone(), (changed[0], changed[1] // self._masses.width)
        included_CG[changed_blocks] = self._masses.reach(self._floors, changed_blocks).sum(dim=1)
        cumulated_CG = included_CG.double().cumsum(dim=1)
        total_C = cumulated_CG[:, -1].nan_to_num(0.0, 0.0, 0.0)
        most = int(total_C.max().ceil()) + 1 if len(total_C) else 1
        points_CM = torch.arange(1, most + 1, device=total_C.device, dtype=torch.float64) - uniform_C[:, None]
        there_CM = points_CM <= total_C[:, None]
        row_M = there_CM.nonzero(as_tuple=True)[0]
        block_M = torch.searchsorted(cumulated_CG, points_CM)[there_CM]
        before_M = torch.where(block_M > 0, cumulated_CG[row_M, (block_M - 1).clamp(min=0)], 0.0)
        within_MW = self._masses.reach(self._floors, (row_M, block_M)).cumsum(dim=1)
        # What rounding leaves over falls on the block's last entry that has any probability.
        place_M = torch.minimum((points_CM[there_CM] - before_M).to(within_MW.dtype), within_MW[:, -1])
        place_M = place_M.clamp_(min=torch.finfo(within_MW.dtype).tiny)
        return row_M, block_M * self._masses.width + torch.searchsorted(within_MW, place_M[:, None]).squeeze(1)


def _softmax_into(out: torch.Tensor, logits_CV: torch.Tensor) -> torch.Tensor:
    """Softmax of every row. ``torch.softmax`` with ``out`` makes an array of its own and copies it."""
    probabilities: torch.Tensor = torch.ops.aten._softmax.out(logits_CV, 1, False, out=out)
    return probabilities
