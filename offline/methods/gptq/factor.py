"""Factorises the Hessian H, damped where it must be, and moves weights by the residual D with the factor."""

import torch

STRIP = 1024  # rows of a matrix [I, I] that are treated at once
ATTEMPTS = 8  # damping grows by 4 each time: from 0.01 to more than 100


def find_factor(h: torch.Tensor, order: torch.Tensor, damp: float) -> tuple[torch.Tensor | None, float]:
    """Upper triangular U with U U^T = H + damp mean(diag H) I, columns in `order`, and the damping that worked."""
    level = h.diagonal().mean()
    if not (torch.isfinite(h).all() and level > 0):
        return None, damp
    backwards = order.flip(0)  # the lower factor of H backwards, read backwards, is the upper factor with U U^T = H
    for attempt in range(ATTEMPTS):
        used = damp * 4**attempt
        damped = _reordered(h, backwards)
        damped.diagonal().add_(used * level)
        lower, failed = _cholesky(damped)
        del damped
        # whatever is not finite in a row of the factor is so in its diagonal element
        if not failed and lower.diagonal().isfinite().all():
            lower = lower.float()
            return lower.flip(0, 1), used
    return None, damp


def _reordered(h: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """H with rows and columns in `order`: doubles where they are no slower than the memory they need, for they save the
    damping of nearly singular H."""
    found = torch.empty_like(h, dtype=torch.float64 if h.device.type == "cpu" else torch.float32)
    for start in range(0, len(h), STRIP):
        rows = slice(start, start + STRIP)
        found[rows] = h[order[rows]][:, order]
    return found


def _cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower factor of a symmetric matrix, and whether that failed; on a CPU in the memory of the matrix itself."""
    if matrix.device.type != "cpu":
        return torch.linalg.cholesky_ex(matrix)
    columns = matrix.mT  # LAPACK's order, in which nothing is copied
    return torch.linalg.cholesky_ex(columns, out=(columns, torch.empty((), dtype=torch.int32)))


def qep(
    weights: torch.Tensor, residual: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, alpha: float
) -> torch.Tensor:
    """W + alpha W D (U U^T)^-1 for weights [B, O, I]; the factor U has its columns in `order`.

    residual: D [B, I, I], or W D [B, O, I] with O < I: the systems are solved for as few rows as there are.
    """
    places = order[:, None].expand_as(residual)
    moved = torch.linalg.solve_triangular(factor.mT, residual.gather(2, places), upper=False, left=False)
    moved = torch.linalg.solve_triangular(factor, moved, upper=True, left=False)
    moved = torch.empty_like(moved).scatter_(2, places, moved)
    if residual.shape[1] == residual.shape[2]:
        moved = weights @ moved
    return weights + moved.mul_(alpha)


def push_of(residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """triu(D U^-T, 1) U^-1: how far a column's value moves the targets of later ones (GPTAQ's public form).

    In place of D, in strips of rows: what stands left of a strip's first diagonal element neither counts nor is needed.
    """
    for start in range(0, residual.shape[1], STRIP):
        strip, own = residual[:, start : start + STRIP], factor[:, start:, start:]
        strip[..., :start] = 0
        moved = torch.linalg.solve_triangular(own.mT, strip[..., start:], upper=False, left=False).triu_(1)
        strip[..., start:] = torch.linalg.solve_triangular(own, moved, upper=True, left=False)
    return residual
