"""Prints a plan as tables for the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from vlmq_vllm.offline.plan.make import Plan
from vlmq_vllm.offline.plan.memory import LIBRARIES
from vlmq_vllm.offline.plan.tensor_parallel import SIZES


def show(plan: Plan) -> None:
    """Print a plan."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for table in (_parts(plan), _linears(plan), _sizes(plan)):
        console.print(table)
    for warning in plan.warnings:
        console.print(f"warning: {warning}")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _parts(plan: Plan) -> Table:
    table = _table("component", "dtype", "parameters", "size", "quantised", "bits per weight", right=("parameters",))
    for part in plan.parts:
        bits = "" if part.bits is None else f"{part.bits:.2f}"
        share = "" if part.bits is None else f"{part.quantized / part.parameters:.1%}"
        table.add_row(part.component, part.dtype, f"{part.parameters:,}", size(part.bytes), share, bits)
    return table


def _linears(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("quantised linears", overflow="fold")
    for column in ("count", "rows x columns", "vLLM's layer", "tensor parallel"):
        table.add_column(column, no_wrap=True)
    for linear in plan.linears:
        width = linear.format.width(linear.columns)
        last = linear.columns % width
        fits = ", ".join(str(count) for count in SIZES if linear.cuts[count] is None) or "none"
        layer = "takes none" if linear.refused else linear.layer.removesuffix("Linear")
        shape = f"{linear.rows} x {linear.columns}{f', last group {last}' if last else ''}"
        table.add_row(linear.pattern, str(linear.count), shape, layer, fits)
    return table


def _sizes(plan: Plan) -> Table:
    peak = plan.peak
    table = Table(box=box.SIMPLE, show_header=False, show_edge=False)
    whole = 8 * plan.checkpoint_bytes / plan.parameters
    table.add_row("checkpoint", f"{size(plan.checkpoint_bytes)}, the source has {size(plan.source_bytes)}")
    table.add_row("bits per weight", f"{plan.bits_per_weight:.3f} quantised, {whole:.3f} over the whole model")
    if plan.load.samples:
        tokens = f"{plan.load.samples} samples of at most {plan.load.tokens} tokens"
        table.add_row("calibration", f"{tokens}, all of them taken for vision tokens")
    most = "at most " if plan.peak_is_bound else ""
    table.add_row("peak memory", f"{most}{size(plan.peak_memory_bytes)} ({size(LIBRARIES)} of it libraries)")
    if plan.peak_device_bytes is not None:
        table.add_row("peak on the GPU", f"{most}{size(plan.peak_device_bytes)}")
    largest = sorted((peak.host | peak.device).items(), key=lambda item: -item[1])
    terms = ", ".join(f"{name} {size(count)}" for name, count in largest if count)
    table.add_row("greatest phase", f"{peak.name}: {terms}")
    return table
