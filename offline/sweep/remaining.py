"""Says how long the configurations that are left will take, once the first has been timed."""

from collections.abc import Callable


class Remaining:
    """count: configurations that are left. Of a single one that is left nothing is said when it is done."""

    def __init__(self, count: int, say: Callable[[str], None]) -> None:
        self.count, self.say, self.timed = count, say, False

    def done(self, seconds: float) -> None:
        """One more has been run, in so many seconds."""
        self.count -= 1
        if not self.timed and self.count > 0:
            self.say(
                f"a configuration takes {duration(seconds)}; {self.count} more take about "
                f"{duration(self.count * seconds)}"
            )
        self.timed = True


def duration(seconds: float) -> str:
    """In a unit of which there are at least two, as far as there is one."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
