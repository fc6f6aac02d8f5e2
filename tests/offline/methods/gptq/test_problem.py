"""Linears that are solved together: which are refined."""

import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.choose import solver_of
from vlmq_vllm.offline.methods.gptq.moments import Moments
from vlmq_vllm.offline.methods.gptq.problem import Problem, solve_all
from vlmq_vllm.offline.settings.methods import ENOUGH_TOKENS
from vlmq_vllm.offline.settings.quantize import Settings

COLUMNS = 16


def solutions(tokens, **options):
    """Of linears of one shape, each with that many tokens: the solver's choice of what goes together is in between."""
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({f"linear{i}": torch.nn.Linear(COLUMNS, 12) for i in range(len(tokens))})
    problems = []
    for name, count in zip(layer, tokens, strict=True):
        moments = Moments(COLUMNS, "cpu")
        moments.add(torch.randn(count, COLUMNS))
        problems.append(Problem((name,), [12], WeightFormat(2, 16, False), torch.bfloat16, moments, None))
    settings = Settings(**{"bits": 2, "group_size": 16, "base": "gptq"} | options)
    return solve_all(problems, layer, solver_of(settings), Ranks(torch.device("cpu")))


def test_weights_with_too_few_tokens_are_refined_only_when_asked_for():
    enough = ENOUGH_TOKENS * COLUMNS
    tokens = (enough, enough - 1, enough)
    found, always, never = solutions(tokens), solutions(tokens, refine=2), solutions(tokens, refine=0)
    assert [[one.refined for one in row] for row in (found, always, never)] == [[2, 0, 2], [2, 2, 2], [0, 0, 0]]
    for one, other in zip(found, (always[0], never[1], always[2]), strict=True):
        assert torch.equal(one.weight.codes, other.weight.codes) and torch.equal(one.weight.scale, other.weight.scale)
    assert not torch.equal(always[1].weight.codes, never[1].weight.codes)


def test_methods_but_vlmq_refine_only_when_asked_for():
    many = (100 * COLUMNS,)
    assert [solutions(many, method=method)[0].refined for method in ("vlmq", "gptq")] == [2, 0]
    assert solver_of(Settings(bits=2, group_size=16, base="gptaq")).refine == 0
