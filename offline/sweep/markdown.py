"""Writes the report of a study as markdown: what was run, and what follows as far as the number of questions allows."""

from collections.abc import Iterable

from vlmq_vllm.offline.settings.compare import CompareSettings


def counted(number: int, what: str) -> str:
    """ "1 part", "2 parts"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def markdown(found: dict) -> str:
    """The text of report.md; `found` as in `run.py`."""
    rows = {(row["method"], row["label"]): row for row in found["rows"]}
    widths = found["settings"]["bits"][::-1]
    uniform = {method: [rows[method, f"all {width}"] for width in widths] for method in found["rises"]}
    every = [found["full_precision"], *(row for own in uniform.values() for row in own)]
    sections = [_about(found), f"## Everything at one width\n\n{_rows(every)}"]
    for method, rises in found["rises"].items():
        table = _rises("share of weights, %", [f"{100 * share:.1f}" for share in found["shares"]], rises)
        sections.append(f"## One part at a time, {method}\n\nThe other parts stay at 16 bits.\n\n{table}")
    sections.append(f"## Front of size and damage\n\n{_rows(found['pareto'])}")
    if mixture := found.get("mixture"):
        table = _rises("bits", map(str, mixture["widths"].values()), mixture["rises"])
        results = _rows([mixture["row"], *uniform[mixture["method"]]])
        sections += [_mixture(found, mixture), results, table, _recipe(mixture["recipe"])]
    return "\n\n".join(sections) + "\n"


def _about(found: dict) -> str:
    group_size = found["settings"]["group_size"]
    groups = "One group per row" if group_size == -1 else f"Groups of {group_size}"
    grid = "symmetric" if found["settings"]["symmetric"] else "asymmetric"
    error = "" if found["questions"] > 1 else " There is one question only, so that there are no standard errors."
    return (
        f"# Component study of {found['model']}\n\n"
        f"{counted(len(found['rows']), 'configuration')} on {counted(found['questions'], 'held-out question')} "
        f"({found['data']}), {found['pictured']} with a picture; calibrated with {found['calibration'] or 'nothing'}. "
        f"{groups}, {grid}, one solver for all widths; every linear was rounded on the full-precision stream.\n\n"
        "KL is that of the next token at the answers' tokens to the full-precision model, over its "
        f'{CompareSettings.top} likeliest tokens and "any other" (at most that over the whole vocabulary), in nats, '
        f"a mean over questions, with its standard error.{error} Bits per weight count scales and zero points; linears "
        "of the study that stay at 16 bits count 16, and bits per parameter run over the whole model."
    )


def _mixture(found: dict, mixture: dict) -> str:
    method, modules = mixture["method"], counted(len(mixture["widths"]), "module")
    text = (
        f"## Mixture within {found['settings']['budget']} bits per weight, {method}\n\n"
        f"Widths of {modules} with the least sum of KL alone ({mixture['sum_of_rises']:.3g} "
        "in sum; that these add up is an assumption, the table has what was measured). The budget is an average over "
        "all weights of the study's linears, those left at 16 bits too; other weights of the model do not count."
    )
    if len(found["rises"]) > 1:
        text += (
            f" Of the methods {method} would do best in a random mixture of this size, judged by the rows with one "
            "width for everything."
        )
    if pooled := mixture["pooled"]:
        where = counted(len(pooled), "module")
        text += (
            f" In {where} a wider width measured worse than a narrower one, which is noise; both count as their mean."
        )
    return text


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


def _rises(heading: str, column: Iterable[str], rises: dict[str, dict[int, float]]) -> str:
    """KL of every part alone, by width, and a column more."""
    widths = sorted(next(iter(rises.values())), reverse=True)
    lines = [
        [part, cell, *(f"{own[width]:.3g}" for width in widths)]
        for cell, (part, own) in zip(column, rises.items(), strict=True)
    ]
    return _table(["part", heading, *(f"KL at {width} bits" for width in widths)], lines)


def _rows(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        kl = f"{row['kl']:.3g}" + ("" if row["kl_error"] is None else f" ({row['kl_error']:.1g})")
        sizes = (f"{row['bits_per_weight']:.3f}", f"{row['bits_per_parameter']:.3f}")
        method = "" if row["method"] == "none" else row["method"]
        lines.append([method, row["label"], *sizes, kl, f"{row['nll']:.4f}", f"{100 * row['exact']:.1f}"])
    return _table(["method", "configuration", "bits per weight", "bits per parameter", "KL", "NLL", "exact, %"], lines)


def _table(names: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *lines))
