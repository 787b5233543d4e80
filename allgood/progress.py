"""Progress bars on stderr, with rate and time left; silent where stderr is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, text: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=total)

    def at(self, done: int) -> None:
        self._progress.update(self._task, completed=done)


@contextmanager
def bar(text: str, total: int) -> Iterator[Bar]:
    """Show a bar while the block runs; a plain line before it where there is no terminal."""
    if not console.is_terminal:
        console.print(f"{text}: {total}", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, text, total)


def say(text: str) -> None:
    """One line for the person at the terminal, on stderr."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def late_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) whose bar appears when it is first called."""
    with ExitStack() as stack:
        shown: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(bar(text, total)))
            shown[0].at(done)

        yield progress
