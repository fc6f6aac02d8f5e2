"""The walk through a stack of layers: weigh tokens, collect moments, solve, put the result in its place, go on.

Two streams run through the stack, U behind the quantised layers and F behind the full-precision ones (where a method
needs it). Within a layer the stages are quantised in the order of the forward pass, and each stage's moments are
collected after the stages before it have been replaced. One layer's weights are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.experts import is_expert
from vlmq_vllm.offline.gptq import Solution, Solver, round_to_nearest, solve
from vlmq_vllm.offline.grid import MINMAX, MSE, GridSearch
from vlmq_vllm.offline.moments import Moments
from vlmq_vllm.offline.ranks import Ranks
from vlmq_vllm.offline.saliency import gradient_norms, in_attention, rounded_norms, token_weights
from vlmq_vllm.offline.settings import Settings
from vlmq_vllm.offline.source import Source
from vlmq_vllm.offline.stages import Group, find_stages, linears_of
from vlmq_vllm.offline.stream import Stream

GRIDS = {"mse": MSE, "minmax": MINMAX, "mse-h": GridSearch(exponent=2, importance=True)}
TOGETHER = 1 << 28  # bytes of moments that are solved as one batch of problems


@dataclass(frozen=True)
class Row:
    """A linear in the report: `loss` per token and row, `damp` and `dead` as in gptq.Solution (None and 0 for "rtn").

    tokens: "saliency" where tokens were weighted ("saliency of rounding" by the fallback "rtn"), "no signal" where they
    should have been but all gradients are zero or some not finite (as in the first layer, where both streams are
    equal), "equal" elsewhere.
    """

    module: str
    loss: float | None
    damp: float | None
    dead: int
    tokens: str


@dataclass
class Problem:
    """Linears that are solved as one because they share moments; their weights are stacked along the rows."""

    linears: Group
    moments: Moments
    weights: list[torch.Tensor] | None  # of the tokens, by batch


class Walk:
    """The streams in front of a stack's next layer. `quantized` and `full` are empty for method "rtn"."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        format: WeightFormat,
        device: torch.device,
        ranks: Ranks,
        quantized: list[Stream],
        full: list[Stream],
        weighted: bool,
    ) -> None:
        self.source, self.settings, self.format, self.device, self.ranks = source, settings, format, device, ranks
        self.quantized, self.full, self.weighted = quantized, full, weighted
        self.solver = Solver(GRIDS[settings.grid], settings.act_order == "static", settings.damp, settings.alpha)
        self.residual = settings.base == "gptaq" and settings.method != "rtn"

    @torch.no_grad()
    def layer(self, name: str, index: int) -> tuple[dict[str, torch.Tensor], list[Row]]:
        """Quantise layer `index` (in-memory name `name`): tensors by their names in the files, and report rows."""
        layer = self.source.materialise(name, self.device)
        originals = {linear: layer.get_submodule(linear).weight for linear in linears_of(layer)}
        weights, tokens = self._weigh(layer, index, name)
        tensors: dict[str, torch.Tensor] = {}
        rows = []
        for stage in self._stages(layer, index):
            for linear, solution in self._solve(layer, index, name, stage, weights, originals):
                module = self.source.module_in_files(f"{name}.{linear}")
                tensors |= {f"{module}.{part}": t for part, t in solution.weight.tensors().items()}
                loss = None if solution.loss is None else float(solution.loss.mean())
                rows.append(Row(module, loss, solution.damp, solution.dead, tokens.get(linear, "equal")))
        self._advance(layer, index, originals)
        self.source.release(name)
        return tensors, rows

    @torch.no_grad()
    def replay(self, name: str, index: int) -> None:
        """Move both streams behind a layer that has been quantised before."""
        if self.quantized:
            layer = self.source.materialise(name, self.device)
            originals = {linear: layer.get_submodule(linear).weight for linear in linears_of(layer)}
            for linear in originals:
                found = self.source.quantized(self.source.module_in_files(f"{name}.{linear}"))
                _put(layer, linear, found.to(self.device, torch.float32))
            self._advance(layer, index, originals)
            self.source.release(name)

    def _advance(self, layer: torch.nn.Module, index: int, originals: dict[str, torch.Tensor]) -> None:
        with holding(layer, originals):
            for stream in self.full:
                stream.hidden = stream.run(layer, index)
        for stream in self.quantized:
            stream.hidden = stream.run(layer, index)

    def _stages(self, layer: torch.nn.Module, index: int) -> list[list[Group]]:
        """The stages of the layer; without data every linear is one."""
        if self.settings.method == "rtn":
            return [[(linear,)] for linear in linears_of(layer)]
        return self.ranks.first(find_stages(layer, index, self.quantized[0]) if self.quantized else None) or []

    def _weigh(self, layer, index, name) -> tuple[dict[str, list[torch.Tensor]], dict[str, str]]:
        """Token weights [N] per batch for each weighted linear with a signal, and what the report says of them."""
        if not self.weighted:
            return {}, {}
        options, family = self.settings, self.source.family
        every = options.saliency_scope == "all"
        linears = [
            linear
            for linear in linears_of(layer)
            # not an expert's: which tokens it sees changes when the attention before it is quantised
            if in_attention(family, linear) or (every and not is_expert(linear))
        ]
        pairs = list(zip(self.full, self.quantized, strict=True))
        norms = [gradient_norms(layer, index, family, full, quantized, linears) for full, quantized in pairs]
        means = self._means(norms, linears)
        found = dict.fromkeys(linears, "saliency")
        if any(mean is None for mean in means.values()):
            found = {linear: "saliency" if means[linear] else "no signal" for linear in linears}
            if options.saliency_fallback == "rtn":
                silent = [linear for linear in linears if means[linear] is None]
                norms, means, found = self._weigh_by_rounding(layer, index, name, silent, norms, means, found)
        bounds = (options.saliency_power, options.saliency_floor, options.saliency_cap)
        weights = {
            linear: token_weights([g[linear] for g in norms], bounds[0], mean, *bounds[1:])
            for linear, mean in means.items()
            if mean is not None
        }
        return weights, found

    def _weigh_by_rounding(self, layer, index, name, silent, norms, means, found):
        """Norms for linears without a signal from the error that the layer's own rounded weights cause."""
        family = self.source.family
        rounded = {linear: self._rounded(layer, name, linear)[1] for linear in linears_of(layer)}
        for stream, known in zip(self.quantized, norms, strict=True):
            known |= rounded_norms(layer, index, family, stream, silent, lambda: holding(layer, rounded))
        means = means | self._means(norms, silent)
        return norms, means, found | {n: "saliency of rounding" for n in silent if means[n] is not None}

    def _means(self, norms: list[dict[str, torch.Tensor]], linears: list[str]) -> dict[str, float | None]:
        """Mean of g over all ranks' tokens; None where all are zero or some are not finite."""
        means: dict[str, float | None] = {}
        for linear in linears:
            pooled = torch.cat([g[linear] for g in norms]).double()
            total = self.ranks.add(torch.stack([pooled.sum(), torch.tensor(float(len(pooled))).to(pooled)]))
            mean = float(total[0] / total[1])
            means[linear] = mean if 0 < mean < float("inf") else None
        return means

    def _solve(self, layer, index, name, stage, weights, originals) -> Iterator[tuple[str, Solution]]:
        """Solve a stage and put the results in their places, rounded as they will be served."""
        if self.settings.method == "rtn":
            for (linear,) in stage:
                weight, value = self._rounded(layer, name, linear)
                _put(layer, linear, value)
                yield linear, Solution(weight, None, None, 0)
            return
        problems = self._collect(layer, index, stage, weights, originals)
        solutions = self._share_out(layer, name, problems)
        for problem, solution in zip(problems, solutions, strict=True):
            sizes = [len(layer.get_submodule(linear).weight) for linear in problem.linears]
            for linear, part in zip(problem.linears, solution.split(sizes), strict=True):
                _put(layer, linear, part.weight.dequantize(part.weight.scale.dtype).float())
                yield linear, part

    def _collect(self, layer, index, stage, weights, originals) -> list[Problem]:
        """One pass over the batches: second moments of every group, or of each linear with token weights of its own."""
        problems = []
        # the two streams send different tokens to an expert: there is no residual between them
        residual = self.residual and len(stage) == 1
        for group in stage:
            columns = layer.get_submodule(group[0]).in_features
            plain = tuple(linear for linear in group if linear not in weights)
            for linears in [*((linear,) for linear in group if linear in weights), *([plain] if plain else [])]:
                problems.append(Problem(linears, Moments(columns, self.device, residual), weights.get(linears[0])))
        first = {problem.linears[0]: problem for problem in problems}
        for i, stream in enumerate(self.quantized):
            targets: dict[str, torch.Tensor] = {}
            if residual:
                with holding(layer, originals):
                    self.full[i].inputs_of(layer, index, first, targets.__setitem__)

            def visit(linear: str, inputs: torch.Tensor, i: int = i, targets: dict = targets) -> None:
                problem = first[linear]
                tokens = problem.weights[i] if problem.weights else None
                problem.moments.add(inputs, tokens, targets.get(linear))

            stream.inputs_of(layer, index, first, visit)
        return problems

    def _share_out(self, layer, name, problems: list[Problem]) -> list[Solution]:
        """Solve the problems, those of one shape together, each on its rank."""
        for number, problem in enumerate(problems):
            owner, moments = self.ranks.owner(number), problem.moments
            count = self.ranks.add(torch.tensor([float(moments.tokens)], device=self.device))
            moments.tokens = int(count)
            self.ranks.reduce(moments.h, owner)
            if moments.residual is not None:
                self.ranks.reduce(moments.residual, owner)
        solutions: list[Solution | None] = [None] * len(problems)
        for numbers in self._alike(layer, problems):
            stacked = [torch.cat([layer.get_submodule(n).weight for n in problems[i].linears]) for i in numbers]
            means = [problems[i].moments.mean() for i in numbers]
            h = torch.stack([h for h, _ in means]) if len(means) > 1 else means[0][0][None]
            residual = None if means[0][1] is None else torch.stack([d for _, d in means])
            dtype = self.source.stored_dtype(f"{name}.{problems[numbers[0]].linears[0]}.weight")
            weights = torch.stack(stacked) if len(stacked) > 1 else stacked[0][None]
            for i, solution in zip(numbers, solve(weights, h, self.format, dtype, self.solver, residual), strict=True):
                solutions[i] = solution
        return [self._exchange(layer, name, i, problem, solutions[i]) for i, problem in enumerate(problems)]

    def _alike(self, layer, problems: list[Problem]) -> list[list[int]]:
        """Numbers of this rank's problems, in batches of one shape and a bounded size."""
        batches: dict[tuple, list[list[int]]] = {}
        for number, problem in enumerate(problems):
            if self.ranks.owner(number) == self.ranks.rank:
                columns = len(problem.moments.h)
                rows = sum(len(layer.get_submodule(linear).weight) for linear in problem.linears)
                found = batches.setdefault((rows, columns), [[]])
                if found[-1] and (len(found[-1]) + 1) * 4 * columns * columns > TOGETHER:
                    found.append([])
                found[-1].append(number)
        return [numbers for found in batches.values() for numbers in found]

    def _exchange(self, layer, name, number: int, problem: Problem, solution: Solution | None) -> Solution:
        """The solution on every rank."""
        if self.ranks.size == 1:
            return solution
        rows = sum(len(layer.get_submodule(linear).weight) for linear in problem.linears)
        dtype = self.source.stored_dtype(f"{name}.{problem.linears[0]}.weight")
        shared = solution or Solution.empty(self.format, rows, len(problem.moments.h), dtype, self.device)
        return shared.exchanged(lambda tensor: self.ranks.broadcast(tensor, self.ranks.owner(number)))

    def _rounded(self, layer, name: str, linear: str):
        """A linear rounded to nearest, as codes and as the weight that is served [O, I] float32."""
        dtype = self.source.stored_dtype(f"{name}.{linear}.weight")
        found = round_to_nearest(layer.get_submodule(linear).weight, self.format, dtype, self.solver.search)
        return found, found.dequantize(dtype).float()


@contextmanager
def holding(layer: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
    """The layer with other weights of its linears for a while."""
    before = {linear: layer.get_submodule(linear).weight for linear in weights}
    for linear, weight in weights.items():
        _put(layer, linear, weight)
    try:
        yield layer
    finally:
        for linear, weight in before.items():
            _put(layer, linear, weight)


def _put(layer: torch.nn.Module, linear: str, weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.nn.Parameter):
        weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.get_submodule(linear).weight = weight
