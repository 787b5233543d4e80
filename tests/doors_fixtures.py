"""Fixtures of the doors' tests, a plugin: each test file names it in `pytest_plugins`.

A data tree and a fitted run are made once for all files, which may read but not write them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doors import IMAGE_SIZE, Command, draw_tree
from killing import Killer

from allgood.cli import main


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """For pictures this small, threads that wait for each other are most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def allgood(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories; nobody may write here."""
    return draw_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PatchCore on the embedded encoder, calibrated; nobody may write here."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["fit", tree, "--image-size", IMAGE_SIZE, "--settings", "coreset_ratio=0.1"]
    assert main([str(word) for word in [*words, "--out", out]]) == 0
    return out


@pytest.fixture(scope="session")
def killer() -> Iterator[Killer]:
    killer = Killer()
    yield killer
    killer.close()
