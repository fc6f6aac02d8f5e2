"""Keeps what was measured of models on the real language model, a line of JSON each, and makes tables of it."""

import itertools
import json
import statistics
import sys
from pathlib import Path

KINDS = ("text", "picture")


class Rows:
    """The lines of a JSONL file, a measured model each; a file that a run left off is completed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, about: dict) -> bool:
        """Whether there is a line of that model. Ends the program where it was made with other settings."""
        settings = about.get("settings")
        for row in self.all:
            if all(row[key] == about[key] for key in ("bits", "name", "seed", "calibration")):
                if row.get("settings") != settings:
                    sys.exit(f"{self.path} has {about} with other settings; give another file or --label")
                return True
        return False

    def add(self, row: dict) -> None:
        self.all.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def table(rows: list[dict]) -> str:
    """Means over seeds as markdown; in brackets the standard error over chats, a mean over seeds as well, or from two
    seeds on the standard deviation over seeds, where that is larger."""
    kinds = [kind for kind in KINDS if f"{kind}_kl" in rows[0]]
    names = [f"{kind} {name}" for kind in kinds for name in ("KL, nats", "top-1, %")]
    lines = [
        f"| bits | calibration | method | seeds | {' | '.join(names)} | CPU s |",
        "| ---: | --- | --- " + "| ---: " * (len(names) + 2) + "|",
    ]
    for (bits, calibration, name), found in _grouped(rows).items():
        cells = []
        for kind, (figure, digits) in itertools.product(kinds, (("kl", 4), ("top1", 1))):
            values = [row[f"{kind}_{figure}"] for row in found]
            error = statistics.fmean(row[f"{kind}_{figure}_error"] for row in found)
            spread = max(error, statistics.stdev(values)) if len(values) > 1 else error
            cells.append(f"{statistics.fmean(values):.{digits}f} ({spread:.{digits}f})")
        seconds = statistics.fmean(row["cpu_seconds"] for row in found)
        lines.append(f"| {bits} | {calibration} | {name} | {len(found)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def differences(rows: list[dict], reference: str) -> str:
    """What each method has more KL than `reference`, in nats, as markdown: the mean over chats, of each chat the
    difference of its means over the seeds that both have; in brackets the standard error over chats. Far smaller than
    that of one method's mean, for a hard chat is hard for all."""
    lines = ["| bits | calibration | method | seeds | text | pictures |", "| ---: | --- | --- | ---: | ---: | ---: |"]
    groups = _grouped(rows)
    for (bits, calibration, name), found in groups.items():
        own, others = (
            {row["seed"]: row for row in one if "text_kls" in row}
            for one in (found, groups.get((bits, calibration, reference), []))
        )
        seeds = own.keys() & others.keys()
        if name == reference or not seeds:
            continue
        cells = []
        for kind in KINDS:
            pairs = [zip(own[seed][f"{kind}_kls"], others[seed][f"{kind}_kls"], strict=True) for seed in seeds]
            each = [statistics.fmean(a - b for a, b in chat) for chat in zip(*pairs, strict=True)]
            error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
            cells.append(f"{statistics.fmean(each):+.4f} ({error:.4f})" if each else "")
        lines.append(f"| {bits} | {calibration} | {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _grouped(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows of each width, calibration and method; within a width the method with the least KL on text first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["calibration"], row["name"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (*item[0][:2], item[1][0]["text_kl"])))
