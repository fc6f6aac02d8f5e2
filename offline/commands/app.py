"""The `vlmq` command: its subcommands, one file each in `commands/`, and what errors make of the exit code.

Heavy modules are imported by the function that needs them, so that `--help` is quick.
"""

import signal
import sys

import typer

from vlmq_vllm.offline.commands.compare import compare
from vlmq_vllm.offline.commands.data import data
from vlmq_vllm.offline.commands.doctor import doctor
from vlmq_vllm.offline.commands.export import dequantize, export
from vlmq_vllm.offline.commands.info import info
from vlmq_vllm.offline.commands.options import is_first, say
from vlmq_vllm.offline.commands.plan import plan
from vlmq_vllm.offline.commands.quantize import quantize
from vlmq_vllm.offline.commands.stopping import STOPPED
from vlmq_vllm.offline.commands.sweep import sweep
from vlmq_vllm.offline.commands.verify import verify

USAGE, REFUSED, UNSOUND = 2, 3, 4  # exit codes; STOPPED (75): to be resumed

app = typer.Typer(
    help="Quantise vision-language models to 2, 3, 4 or 8 bits and check the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
for command in (plan, quantize, verify, info, compare, sweep, dequantize, export, doctor):
    app.command()(command)
app.add_typer(data, name="data")


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and an exit code that tells its kind."""
    from vlmq_vllm.errors import CheckpointError, QuantizeError, RefusedError, StoppedError

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that half-written output goes
    try:
        app()
    except StoppedError as stopped:
        if is_first():
            say(str(stopped))
        sys.exit(STOPPED)
    except (QuantizeError, CheckpointError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        sys.exit(
            REFUSED if isinstance(error, RefusedError) else UNSOUND if isinstance(error, CheckpointError) else USAGE
        )
