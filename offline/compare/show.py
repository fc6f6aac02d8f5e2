"""Prints the report of a comparison as a table: figures of every part of the data, intervals below them."""

from rich import box
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 240  # where there is no terminal, nothing is wrapped
COLUMNS = (  # heading, figure, factor, format
    ("KL", "kl", 1, ".2g"),
    ("top-1 %", "top1", 100, ".1f"),
    ("greedy same %", "greedy_same", 100, ".1f"),
    ("differs at", "first_difference", 1, ".1f"),
    ("NLL 16-bit", "nll_teacher", 1, ".4f"),
    ("NLL quantised", "nll_student", 1, ".4f"),
    ("change", "nll_difference", 1, ".4f"),
    ("exact % 16-bit", "exact_teacher", 100, ".1f"),
    ("exact % quantised", "exact_student", 100, ".1f"),
    ("change", "exact_difference", 100, ".1f"),
)


def show(report: dict, console: Console | None = None) -> None:
    """Print the report's splits and what the columns mean."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    shown = [column for column in COLUMNS if any(row[column[1]] for row in report["splits"])]
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("split")
    table.add_column("n", justify="right")
    for heading, *_ in shown:
        table.add_column(heading, justify="right")
    for row in report["splits"]:
        table.add_row(row["split"], str(row["n"]), *(_cell(row[name], factor, form) for _, name, factor, form in shown))
    console.print(table)
    console.print(_legend(report), markup=False, soft_wrap=True)


def _cell(figure: dict | None, factor: int, form: str) -> str:
    if figure is None:
        return "-"
    mean, low, high = (None if figure[k] is None else factor * figure[k] for k in ("mean", "low", "high"))
    return f"{mean:{form}}" + ("" if low is None else f"\n{low:{form}} .. {high:{form}}")


def _legend(report: dict) -> str:
    kl, tokens = report["kl"], report["max_new_tokens"]
    outcomes = "over the whole vocabulary" if kl["exact"] else f"over {kl['top']} tokens and the rest, a lower bound"
    lines = [
        "Means over samples with 95 % bootstrap intervals.",
        f"KL: of the quantised from the 16-bit model, nats per answer token, {outcomes}.",
        "Exact: every answer token is the likeliest after the right ones, so the greedy answer is the reference.",
    ]
    if tokens:
        lines.append(f"Greedy same: equal greedy answers up to {tokens} tokens.")
    if any(row["first_difference"] for row in report["splits"]):
        lines.append("Differs at: tokens before the first difference, of the greedy answers that differ.")
    return "\n".join(lines)
