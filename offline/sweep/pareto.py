"""Finds and draws the Pareto front: configurations than which no other is both smaller and better."""

from pathlib import Path


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Numbers of the points (size, damage) that no other point beats in one without losing in the other, by size.

    Of equal points the first is taken.
    """
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[number][1] < points[front[-1]][1]:
            front.append(number)
    return front


def draw(path: Path, rows: list[dict]) -> None:
    """Draw every row's `bits_per_weight` and `kl` (nats, on a logarithmic scale) by method, with the Pareto front.

    Rows without damage have no place on that scale and are left out. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["kl"] > 0]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        axes.scatter([r["bits_per_weight"] for r in own], [r["kl"] for r in own], s=14, label=method)
    front = [rows[i] for i in pareto_front([(row["bits_per_weight"], row["kl"]) for row in rows])]
    axes.step([r["bits_per_weight"] for r in front], [r["kl"] for r in front], where="post", color="black", lw=1)
    axes.plot([r["bits_per_weight"] for r in front], [r["kl"] for r in front], "ko", mfc="none", label="front")
    axes.set(yscale="log", xlabel="bits per weight, with scales and zero points", ylabel="KL, nats per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)
