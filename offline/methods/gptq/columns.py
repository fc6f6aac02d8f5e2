"""Rounds weights column by column; later columns make good the error of each (GPTQ, 2210.17323).

With the Hessian H = U U^T, U upper triangular, the weighted error of a row is |delta U|^2 for delta = target - rounded,
and the best value for column k, given the columns before it, is

    target_k + sum_{j < k} delta_j U_jk / U_kk.

Rounding that value is GPTQ's step (Alg. 1) in the form of LDLQ (QuIP, 2307.13304, theorem 6 proves the two equal): one
Cholesky factor and no inverse, a quarter of the work, and it works in float32 where H^-1 would be lost.

The columns are split in halves, again and again: the left half is rounded, what it owes to the right half is one matrix
product, then comes the right half. Everything is transposed, [I, O], so that a column is contiguous, and carries a
leading dimension B of independent problems of one shape.
"""

from collections.abc import Callable

import torch

LEAF = 32  # columns that are rounded one by one between two matrix products

FindGrid = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


class ColumnPass:
    """State of a pass over `targets` [B, I, O] with factors U [B, I, I].

    remainder: the targets, overwritten: what a column's rounding leaves of its target, delta, takes its place.
    scale, zero: [B, G, O] float32; group_of [B, I] is the group of each column in the order of treatment.
    push: [B, I, I] strictly upper or None; the value that is rounded in column i moves the target of every later
    column k by itself times push_ik (GPTAQ's residual).
    After `run`: `codes` [B, I, O] uint8, and `loss` [B, O], each row's delta H delta^T.
    """

    def __init__(
        self,
        targets: torch.Tensor,
        factor: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        group_of: torch.Tensor,
        levels: int,
        push: torch.Tensor | None = None,
    ) -> None:
        self.remainder = targets
        self.owed = torch.zeros_like(targets)  # sum_j delta_j U_jk, what the columns before k leave to it
        self.factor, self.push = factor, push
        self.scale, self.zero, self.levels = scale, zero, levels
        self.problems, self.group_of = torch.arange(len(targets), device=targets.device), group_of
        self.only = group_of[0].tolist() if len(targets) == 1 else None  # plain indices, which give views
        self.values = torch.empty_like(targets) if push is not None else None
        self.codes = torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
        self.loss = torch.zeros_like(targets[:, 0])

    def run(self, width: int = 0, find_grid: FindGrid | None = None) -> None:
        """Round every column. With `find_grid` the scales of a group of `width` columns are asked for when its first
        column is reached: find_grid(compensated weights [B, n, O], first, last) -> scale and zero [B, O]."""
        self.width, self.find_grid = width, find_grid
        self._span(0, self.remainder.shape[1])

    def _span(self, start: int, stop: int) -> None:
        if self.find_grid and start % self.width == 0 and stop == min(start + self.width, self.remainder.shape[1]):
            self._regrid(self.find_grid, start, stop)
        if stop - start <= LEAF and not (self.find_grid and stop - start > self.width):
            self._columns(start, stop)
            return
        middle = self._middle(start, stop)
        self._span(start, middle)
        left, right = slice(start, middle), slice(middle, stop)
        self.owed[:, right].baddbmm_(self.factor[:, left, right].mT, self.remainder[:, left])
        if self.push is not None and self.values is not None:
            self.remainder[:, right].baddbmm_(self.push[:, left, right].mT, self.values[:, left])
        self._span(middle, stop)

    def _middle(self, start: int, stop: int) -> int:
        """Half way, on the border of a group while there are several and of a leaf otherwise."""
        step = self.width if self.find_grid and stop - start > self.width else min(LEAF, (stop - start) // 2)
        return start + step * max(1, (stop - start) // step // 2)

    def _regrid(self, find_grid: FindGrid, start: int, stop: int) -> None:
        """Grid of the group start .. stop from the weights as the columns before have left them."""
        own = self.factor[:, start:stop, start:stop]
        moved = torch.linalg.solve_triangular(own.mT, self.owed[:, start:stop], upper=False)
        scale, zero = find_grid(self.remainder[:, start:stop] + moved, start, stop)
        group = start // self.width  # in file order, for every problem
        self.scale[:, group], self.zero[:, group] = scale, zero

    def _grid(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero [B, O] of the k-th column."""
        if self.only:
            return self.scale[:, self.only[k]], self.zero[:, self.only[k]]
        groups = self.group_of[:, k]
        return self.scale[self.problems, groups], self.zero[self.problems, groups]

    def _columns(self, start: int, stop: int) -> None:
        """Round the columns start .. stop, at most LEAF, one by one."""
        if self.remainder.is_cuda:
            self._columns_in_triton(start, stop)
        else:
            self._columns_in_torch(start, stop)

    def _columns_in_triton(self, start: int, stop: int) -> None:
        from vlmq_vllm.offline.methods.gptq.columns_kernel import round_columns  # here, so that a CPU needs no Triton

        round_columns(self, range(start, stop), LEAF)

    def _columns_in_torch(self, start: int, stop: int) -> None:
        diagonal = self.factor.diagonal(dim1=1, dim2=2)[:, start:stop, None]
        for k in range(start, stop):
            scale, zero = self._grid(k)
            pivot = diagonal[:, k - start]
            value = self.remainder[:, k] + self.owed[:, k] / pivot
            codes = (value / scale).add_(zero).round_().clamp_(0, self.levels - 1)
            self.codes[:, k] = codes
            rounded = codes.sub_(zero).mul_(scale)
            self.loss += ((value - rounded) * pivot).square_()
            self.remainder[:, k] -= rounded
            if k + 1 < stop:
                row = self.factor[:, k, k + 1 : stop, None]
                self.owed[:, k + 1 : stop].addcmul_(row, self.remainder[:, None, k])
            if self.push is not None and self.values is not None:
                self.values[:, k] = value
                self.remainder[:, k + 1 : stop].addcmul_(self.push[:, k, k + 1 : stop, None], value[:, None])
