"""Turns the settings of a run into a grid search and a solver for its linears."""

from vlmq_vllm.offline.methods.gptq.solve import Solver
from vlmq_vllm.offline.methods.grid import CLIP, MINMAX, MSE, GridSearch
from vlmq_vllm.offline.settings.methods import CLIPPED
from vlmq_vllm.offline.settings.quantize import Settings

GRIDS = {"mse": MSE, "minmax": MINMAX, "mse-h": GridSearch(exponent=2, importance=True)}


def grid_of(settings: Settings) -> GridSearch:
    """The search for grids of weights that are rounded to nearest, which knows no inputs."""
    return GRIDS[settings.grid]


def solver_of(settings: Settings) -> Solver:
    """How a linear is solved: AWQ rounds to nearest on ranges that it has clipped, the others compensate."""
    if settings.row.rounding == CLIPPED:
        return Solver(CLIP, compensate=False)
    static, qep = settings.act_order == "static", settings.base == "qep"
    return Solver(GRIDS[settings.grid], static, settings.damp, settings.alpha, qep, settings.refine)
