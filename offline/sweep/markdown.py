"""Writes the report of a study as markdown: what was run, and what follows as far as the number of questions allows."""

from typing import TYPE_CHECKING

from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.sweep.forest import LEAST, Forest

if TYPE_CHECKING:
    from vlmq_vllm.offline.sweep.report import Mixed, Study

MODULES = 200  # more modules are left to the recipe


def counted(number: int, what: str) -> str:
    """ "1 part", "2 parts"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def markdown(study: "Study", forests: dict[str, list[Forest]], pareto: list[dict]) -> str:
    """The text of report.md."""
    sections = [_about(study), _uniform(study), *(_alone(study, method) for method in study.found)]
    sections += [_forest(study, method, found) for method, found in forests.items()]
    sections.append("## Front of size and damage\n\n" + _rows(pareto))
    if study.mixed:
        sections.append(_mixture(study, study.mixed))
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


def _uniform(study: "Study") -> str:
    widths = study.settings.bits[::-1]
    rows = [found[(width,) * len(study.parts)] for found in study.found.values() for width in widths]
    return "## Everything at one width\n\n" + _rows([study.base, *rows])


def _alone(study: "Study", method: str) -> str:
    """One part at each width, the others at 16."""
    widths = study.settings.bits[::-1]
    lines = _head(["part", "share of weights, %", *(f"KL at {width} bits" for width in widths)])
    for part, share, rises in zip(study.parts, study.shares, study.rises(method), strict=True):
        lines.append(_line([part.name, f"{100 * share:.1f}", *(f"{rises[width]:.3g}" for width in widths)]))
    return f"## One part at a time, {method}\n\nThe other parts stay at 16 bits.\n\n" + "\n".join(lines)


def _forest(study: "Study", method: str, forests: list[Forest]) -> str:
    title = f"## What a random forest makes of it, {method}\n\n"
    if not forests:
        return title + f"There are too few configurations that differ to fit one (it takes {LEAST})."
    text = "Shares of a model that predicts KL from widths, not damage: read the table above first. R^2 is out of bag."
    if len(study.settings.bits) > 1:
        text += " Rows with the narrowest width carry most of the variance, "
        if any(forest.without for forest in forests):
            text += (
                "so that a second forest is fitted without them; where the two disagree, the parts' order depends on "
                "the widths in question."
            )
        else:
            text += f"and too few others that differ are left ({LEAST} are needed) to see what they say alone."
    text += "\n\n"
    lines = _head(["rows", "R^2", "figure", *(part.name for part in study.parts)])
    for forest in forests:
        rows = f"{forest.rows}" if forest.without is None else f"{forest.rows} without {forest.without} bits"
        lines.append(_line([rows, f"{forest.r2:.2f}", "impurity, %", *(f"{100 * v:.1f}" for v in forest.impurity)]))
        pairs = zip(forest.permutation, forest.spread, strict=True)
        lines.append(_line([rows, f"{forest.r2:.2f}", "permutation", *(f"{m:.3f} ({s:.3f})" for m, s in pairs)]))
    return title + text + "\n".join(lines)


def _mixture(study: "Study", mixed: "Mixed") -> str:
    uniform = [study.found[mixed.method][(width,) * len(study.parts)] for width in study.settings.bits[::-1]]
    text = (
        f"## Mixture within {study.settings.budget} bits per weight, {mixed.method}\n\n"
        f"Widths of {counted(len(mixed.modules), 'module')} with the least sum of KL alone ({mixed.mixture.rise:.3g} "
        "in sum; that these add up is an assumption, the table has what was measured). The budget is an average over "
        "all weights of the study's linears, those left at 16 bits too; other weights of the model do not count. "
    )
    if mixed.blind:
        text += "Blind mixtures, at most as large as the budget, have its two neighbouring widths at random places."
    else:
        text += "There is no blind mixture beside it: at this budget it would have one width everywhere."
    if len(study.found) > 1:
        text += (
            f" Of the methods {mixed.method} would do best in a blind mixture of this size, judged by the rows with "
            "one width for everything."
        )
    text += "\n\n"
    text += _rows([mixed.row, *mixed.blind, *uniform])
    if mixed.mixture.pooled:
        text += (
            f"\n\nIn {len(mixed.mixture.pooled)} modules a wider width measured worse than a narrower one, which is "
            "noise; both count as their mean: " + ", ".join(mixed.mixture.pooled[:10])
        )
        text += ", ..." if len(mixed.mixture.pooled) > 10 else "."
    lines = _head(["module", "bits", *(f"KL at {width} bits" for width in study.settings.bits[::-1])])
    rows = list(zip(mixed.modules, mixed.mixture.widths, mixed.rises, strict=True))
    for module, width, rises in rows[:MODULES]:
        measured = (f"{rises[bits]:.3g}" for bits in study.settings.bits[::-1])
        lines.append(_line([module.name, str(width), *measured]))
    left = f"\n\n{len(rows) - MODULES} more modules are in recipe.yaml." if len(rows) > MODULES else ""
    return text + "\n\n" + "\n".join(lines) + left + "\n\n" + _recipe(mixed.recipe)


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
    lines = _head(["method", "configuration", "bits per weight", "bits per parameter", "KL", "NLL", "exact, %"])
    for row in rows:
        kl = f"{row['kl']:.3g}" + ("" if row["kl_error"] is None else f" ({row['kl_error']:.1g})")
        sizes = (f"{row['bits_per_weight']:.3f}", f"{row['bits_per_parameter']:.3f}")
        method = "" if row["method"] == "none" else row["method"]
        lines.append(_line([method, row["label"], *sizes, kl, f"{row['nll']:.4f}", f"{100 * row['exact']:.1f}"]))
    return "\n".join(lines)


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
