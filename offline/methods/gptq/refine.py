"""Improves weights that are solved: scales and codes in turn, each by what is best for the other as it is.

For targets T, codes C, zero points Z and a scale s_g for each group of columns, the error E = T - s (C - Z) of a row
costs E H E^T. That is quadratic in the scales: with the codes as they are, the best ones solve G linear equations. With
the scales as they are, the best code of one column, given all others, is the nearest to C_j + (E H)_j / (s H_jj), and
columns are taken in turn. No step raises the cost. GPTQ chooses a grid before it knows the codes, and a column
before it knows the later ones; both are looked at again here. COMQ (2403.07134) and CDQuant (2406.17542) are such
descents along coordinates; least squares for scales are those of GPTVQ's codebooks (2402.15319).
"""

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat

LEAF = 32  # columns that are treated one by one between two matrix products
CPU_CHUNK = 1 << 21  # weights that are treated at once, so that temporaries stay in the cache
CHUNK = 1 << 24  # elsewhere, where every operation has its price
RIDGE = 1e-4  # of the equations' diagonal, towards the scales as they were: codes of a group may all be zero


def refine(
    targets: torch.Tensor, h: torch.Tensor, damp: float, weight: QuantizedWeight, rounds: int
) -> tuple[QuantizedWeight, torch.Tensor]:
    """The weight [O, I] after `rounds` of new scales and new codes, and the cost [O] of its rows.

    targets: [O, I] float32. h: H [I, I]; what counts is H + damp I. Scales are rounded to their dtype before codes are
    chosen for them.
    """
    zero = torch.full_like(weight.scale, weight.format.middle) if weight.zero is None else weight.zero
    chunk = CPU_CHUNK if h.device.type == "cpu" else CHUNK
    rows = max(1, chunk // max(len(h), weight.scale.shape[1] ** 2))
    split = (tensor.split(rows) for tensor in (targets, weight.codes, weight.scale, zero))
    parts = [_Rows(part, h, damp, weight.format, *solved) for part, *solved in zip(*split, strict=True)]
    found = [part.refined(rounds) for part in parts]
    codes, scales, losses = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return QuantizedWeight(weight.format, codes, scales, weight.zero), losses


class _Rows:
    """A few rows, all turned over so that a column is contiguous: targets, codes [I, n], scale and zero [G, n]."""

    def __init__(
        self,
        targets: torch.Tensor,
        h: torch.Tensor,
        damp: float,
        format: WeightFormat,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
    ) -> None:
        self.h, self.damp, self.levels, self.dtype = h, damp, format.levels, scale.dtype
        self.group_of = format.group_of(len(h), h.device)
        self.groups, self.diagonal = self.group_of.tolist(), (h.diagonal() + damp).tolist()
        self.width = min(format.width(len(h)), len(h))
        self.targets, self.codes = targets.T.contiguous(), codes.T.float().contiguous()
        self.scale, self.zero = scale.T.float().contiguous(), zero.T.float().contiguous()

    def refined(self, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [n, I] uint8, scale [n, G] and cost [n]."""
        wanted = self._product(slice(None), self.targets)
        pull, cost = self._state(self.scale)
        for _ in range(rounds):
            scale = self._best_scales(wanted)
            new_pull, new_cost = self._state(scale)
            better = new_cost < cost  # not always: scales are rounded
            self.scale = torch.where(better, scale, self.scale)
            self._choose_codes(torch.where(better, new_pull, pull))
            pull, cost = self._state(self.scale)
        return self.codes.T.to(torch.uint8).contiguous(), self.scale.T.to(self.dtype).contiguous(), cost

    def _product(self, span: slice, x: torch.Tensor) -> torch.Tensor:
        """(H + damp I)[:, span] x for x [span, n]."""
        found = self.h[:, span] @ x
        found[span].add_(x, alpha=self.damp)
        return found

    def _state(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H E [I, n] of the errors E with these scales, and the cost [n]."""
        error = self.targets - (self.codes - self.zero[self.group_of]) * scale[self.group_of]
        pull = self._product(slice(None), error)
        return pull, (error * pull).sum(0)

    def _best_scales(self, wanted: torch.Tensor) -> torch.Tensor:
        """Scales [G, n] with the least cost for the codes, all positive; wanted: H T."""
        steps = self.codes - self.zero[self.group_of]
        count, rows = self.scale.shape
        left, right = steps.new_zeros(rows, count, count), steps.new_empty(rows, count)
        for group in range(count):
            start = group * self.width
            span = slice(start, start + self.width)
            right[:, group] = (steps[span] * wanted[span]).sum(0)
            products = self._product(span, steps[span])[start:].mul_(steps[start:])
            padded = torch.nn.functional.pad(products, (0, 0, 0, -len(products) % self.width))
            sums = padded.unflatten(0, (count - group, self.width)).sum(1).T
            left[:, group, group:] = left[:, group:, group] = sums
        old = self.scale.T
        ridge = left.diagonal(dim1=1, dim2=2).mul(RIDGE).clamp_min(torch.finfo(torch.float32).tiny)
        left.diagonal(dim1=1, dim2=2).add_(ridge)
        found, failed = torch.linalg.solve_ex(left.double(), (right + ridge * old).double())
        found = found.to(self.dtype).float()
        good = (found > 0) & found.isfinite()
        return torch.where(good.all(1, keepdim=True) & (failed == 0)[:, None], found, old).T.contiguous()

    def _choose_codes(self, pull: torch.Tensor) -> None:
        """The best code of each column in turn; pull: H E, overwritten."""
        for start in range(0, len(self.h), LEAF):
            span = slice(start, min(start + LEAF, len(self.h)))
            own = self.h[span, span]
            moved = torch.empty_like(pull[span])
            for k in range(span.stop - start):
                column = start + k
                codes, scale = self.codes[column], self.scale[self.groups[column]]
                best = (codes + pull[column] / (scale * self.diagonal[column])).round_().clamp_(0, self.levels - 1)
                moved[k] = best.sub(codes).mul_(scale)
                self.codes[column] = best
                later = slice(column + 1, span.stop)
                pull[later].addcmul_(own[k + 1 :, k, None], moved[None, k], value=-1)
            if span.stop < len(self.h):
                pull[span.stop :].addmm_(self.h[span.stop :, span], moved, alpha=-1)
