"""Sums up the Hessian of a linear's inputs, with token weights: all that the solver needs to know of the data.

For inputs x_n [I] after the quantised layers, the same tokens' inputs f_n after the full-precision layers, and token
weights lambda_n,

    H = sum_n lambda_n x_n x_n^T                    lambda = 1: GPTQ (2210.17323); lambda = g^2 or g: VLMQ (2508.03351)
    D = sum_n lambda_n (f_n - x_n) x_n^T            the residual of GPTAQ (2504.02692), only where it is asked for

or W D for a weight W [O, I] that is known beforehand, which is less work and memory where O is small beside I.
"""

import torch

BLOCK = 2048  # columns; H is summed in blocks on and above its diagonal and mirrored at the end


class Moments:
    """Running sums in float32: `h` [I, I], `residual` or None, and the number of tokens.

    residual: D [I, I], or with `weight` [O, I] W D [O, I].
    """

    def __init__(
        self, columns: int, device: torch.device | str, residual: bool = False, weight: torch.Tensor | None = None
    ) -> None:
        self.h = torch.zeros(columns, columns, device=device)
        self.weight = weight
        rows = columns if weight is None else len(weight)
        self.residual = torch.zeros(rows, columns, device=device) if residual else None
        self.tokens = 0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None, full: torch.Tensor | None = None) -> None:
        """Add tokens: inputs [N, I], weights [N] or None for 1, and for the residual the full-precision inputs."""
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights.float()[:, None]
        for start in range(0, len(self.h), BLOCK):
            self.h[start : start + BLOCK, start:].addmm_(weighted[:, start : start + BLOCK].T, inputs[:, start:])
        if self.residual is not None:
            moved = full.float() - inputs
            self.residual.addmm_((moved if self.weight is None else moved @ self.weight.T).T, weighted)
        self.tokens += len(inputs)

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """H and the residual per token; the sums are finished in place and must not grow any more."""
        for start in range(BLOCK, len(self.h), BLOCK):
            self.h[start:, start - BLOCK : start] = self.h[start - BLOCK : start, start:].T
        count = max(self.tokens, 1)
        return self.h.div_(count), None if self.residual is None else self.residual.div_(count)
