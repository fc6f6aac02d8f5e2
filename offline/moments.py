"""Second moments of a linear's inputs, with token weights: all that the column solver needs to know of the data.

For inputs x_n [I] behind the quantised layers, the same tokens' inputs f_n behind the full-precision layers, and token
weights lambda_n,

    H = sum_n lambda_n x_n x_n^T                    lambda = 1: GPTQ (2210.17323); lambda = g^2 or g: VLMQ (2508.03351)
    D = sum_n lambda_n (f_n - x_n) x_n^T            the residual of GPTAQ (2504.02692), only where it is asked for
"""

import torch


class Moments:
    """Running sums in float32: `h` [I, I], `residual` [I, I] or None, and the number of tokens."""

    def __init__(self, columns: int, device: torch.device | str, residual: bool = False) -> None:
        self.h = torch.zeros(columns, columns, device=device)
        self.residual = torch.zeros_like(self.h) if residual else None
        self.tokens = 0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None, full: torch.Tensor | None = None) -> None:
        """Add tokens: inputs [N, I], weights [N] or None for 1, and for the residual the full-precision inputs."""
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights.float()[:, None]
        self.h.addmm_(weighted.T, inputs)
        if self.residual is not None:
            self.residual.addmm_((full.float() - inputs).T, weighted)
        self.tokens += len(inputs)

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """H and D per token; the sums are scaled in place and must not grow any more."""
        count = max(self.tokens, 1)
        return self.h.div_(count), None if self.residual is None else self.residual.div_(count)
