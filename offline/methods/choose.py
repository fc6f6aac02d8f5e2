"""Turns the settings of a run into a grid search and a solver for its linears."""

from vlmq_vllm.offline.methods.gptq.solve import Solver
from vlmq_vllm.offline.methods.grid import CLIP, MINMAX, MSE, GridSearch
from vlmq_vllm.offline.settings.methods import CLIPPED, ENOUGH_TOKENS
from vlmq_vllm.offline.settings.quantize import Settings

ROUNDS = 2  # of refining, where nothing else is said: a third one gains a few per cent of the loss
GRIDS = {"mse": MSE, "minmax": MINMAX, "mse-h": GridSearch(exponent=2, importance=True)}


def grid_of(settings: Settings) -> GridSearch:
    """The search for grids of weights that are rounded to nearest, which knows no inputs."""
    return GRIDS[settings.grid]


def solver_of(settings: Settings) -> Solver:
    """How a linear is solved: AWQ rounds to nearest on ranges that it has clipped, the others compensate."""
    if settings.row.rounding == CLIPPED:
        return Solver(CLIP, compensate=False)
    static, qep = settings.act_order == "static", settings.base == "qep"
    rounds, enough = (ROUNDS, ENOUGH_TOKENS) if settings.refine is None else (settings.refine, 0)
    return Solver(GRIDS[settings.grid], static, settings.damp, settings.alpha, qep, rounds, enough)
