"""Writes the report of a study as markdown: what was run, and what follows as far as the number of questions allows."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vlmq_vllm.offline.settings.compare import CompareSettings

if TYPE_CHECKING:
    from vlmq_vllm.offline.sweep.report import Mixed, Study


def counted(number: int, what: str) -> str:
    """ "1 part", "2 parts"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def markdown(study: "Study", pareto: list[dict]) -> str:
    """The text of report.md."""
    widths = study.settings.bits[::-1]
    uniform = {m: [found[(width,) * len(study.parts)] for width in widths] for m, found in study.found.items()}
    sections = [_about(study), "## Everything at one width\n\n" + _rows([study.base, *sum(uniform.values(), [])])]
    sections += [_alone(study, method) for method in study.found]
    sections.append("## Front of size and damage\n\n" + _rows(pareto))
    if study.mixed:
        sections.append(_mixture(study, study.mixed, uniform[study.mixed.method]))
    return "\n\n".join(sections) + "\n"


def _about(study: "Study") -> str:
    options, about = study.settings, study.about
    groups = "One group per row" if options.group_size == -1 else f"Groups of {options.group_size}"
    grid = "symmetric" if options.symmetric else "asymmetric"
    error = "" if about["questions"] > 1 else " There is one question only, so that there are no standard errors."
    return (
        f"# Component study of {about['model']}\n\n"
        f"{counted(len(study.rows), 'configuration')} on {counted(about['questions'], 'held-out question')} "
        f"({about['data']}), {about['pictured']} with a picture; calibrated with {about['calibration'] or 'nothing'}. "
        f"{groups}, {grid}, one solver for all widths; every linear was rounded on the full-precision stream.\n\n"
        "KL is that of the next token at the answers' tokens to the full-precision model, over its "
        f'{CompareSettings.top} likeliest tokens and "any other" (at most that over the whole vocabulary), in nats, '
        f"a mean over questions, with its standard error.{error} Bits per weight count scales and zero points; linears "
        "of the study that stay at 16 bits count 16, and bits per parameter run over the whole model."
    )


def _alone(study: "Study", method: str) -> str:
    """One part at each width, the others at 16."""
    widths = study.settings.bits[::-1]
    lines = [
        [part.name, f"{100 * share:.1f}", *(f"{rises[width]:.3g}" for width in widths)]
        for part, share, rises in zip(study.parts, study.shares, study.rises(method), strict=True)
    ]
    table = _table(["part", "share of weights, %", *(f"KL at {width} bits" for width in widths)], lines)
    return f"## One part at a time, {method}\n\nThe other parts stay at 16 bits.\n\n{table}"


def _mixture(study: "Study", mixed: "Mixed", uniform: list[dict]) -> str:
    text = (
        f"## Mixture within {study.settings.budget} bits per weight, {mixed.method}\n\n"
        f"Widths of {counted(len(mixed.modules), 'module')} with the least sum of KL alone ({mixed.mixture.rise:.3g} "
        "in sum; that these add up is an assumption, the table has what was measured). The budget is an average over "
        "all weights of the study's linears, those left at 16 bits too; other weights of the model do not count."
    )
    if len(study.found) > 1:
        text += (
            f" Of the methods {mixed.method} would do best in a random mixture of this size, judged by the rows with "
            "one width for everything."
        )
    if pooled := mixed.mixture.pooled:
        where = counted(len(pooled), "module")
        text += (
            f" In {where} a wider width measured worse than a narrower one, which is noise; both count as their mean."
        )
    widths = study.settings.bits[::-1]
    lines = [
        [module.name, str(width), *(f"{rises[bits]:.3g}" for bits in widths)]
        for module, width, rises in zip(mixed.modules, mixed.mixture.widths, mixed.rises, strict=True)
    ]
    table = _table(["module", "bits", *(f"KL at {width} bits" for width in widths)], lines)
    return "\n\n".join([text, _rows([mixed.row, *uniform]), table, _recipe(mixed.recipe)])


def _recipe(recipe: dict) -> str:
    if "method" in recipe:
        return (
            f"recipe.yaml holds these widths, and the method {recipe['method']}, since there was no calibration data: "
            "`vlmq quantize MODEL -o OUT --recipe recipe.yaml` makes a checkpoint of it. With calibration data, "
            "`--method vlmq --data CALIBRATION` wins over the recipe."
        )
    return (
        "recipe.yaml holds these widths alone: `vlmq quantize MODEL -o OUT --data CALIBRATION --recipe recipe.yaml` "
        "makes a checkpoint of them by its own default method, or by the --method that is given, in which every layer "
        "also answers for the errors of those before it. Its figures are not those of this report; `vlmq compare` "
        "measures them."
    )


def _rows(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        kl = f"{row['kl']:.3g}" + ("" if row["kl_error"] is None else f" ({row['kl_error']:.1g})")
        sizes = (f"{row['bits_per_weight']:.3f}", f"{row['bits_per_parameter']:.3f}")
        method = "" if row["method"] == "none" else row["method"]
        lines.append([method, row["label"], *sizes, kl, f"{row['nll']:.4f}", f"{100 * row['exact']:.1f}"])
    return _table(["method", "configuration", "bits per weight", "bits per parameter", "KL", "NLL", "exact, %"], lines)


def _table(names: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *lines))
