"""Progress bars on stderr, with rate and time left; one plain line where stderr is no terminal."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def is_first_process() -> bool:
    """Whether this process speaks for all that train together; torchrun and Lightning Fabric
    number them."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


console = Console(stderr=True, quiet=not is_first_process())


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, text: str, total: int) -> None:
        self._progress = progress
        self._text = text
        self._task = progress.add_task(text, total=total)

    def at(self, done: int, total: int | None = None, *, note: str | None = None) -> None:
        """So much is done; `total` where it has changed, `note` to stand behind the text."""
        text = None if note is None else f"{self._text}, {note}"
        self._progress.update(self._task, completed=done, total=total, description=text)


@contextmanager
def bar(text: str, total: int) -> Iterator[Bar]:
    """Show a bar while the block runs; bars may follow each other but not stand in each other."""
    if not console.is_terminal:
        console.print(f"{text}: {total}", highlight=False, markup=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # stdout carries results only, so it is left alone, bar or not.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=False
    ) as progress:
        yield Bar(progress, text, total)


@contextmanager
def late_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) whose bar appears when it is first called."""
    with ExitStack() as stack:
        shown: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(bar(text, total)))
            shown[0].at(done, total)

        yield progress


def say(text: str) -> None:
    """One line for the person at the terminal, on stderr."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
