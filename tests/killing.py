"""A command that is killed at a given moment, for tests of what it goes on with."""

import json
import subprocess
import sys
from pathlib import Path


class Killer:
    """Runs `allgood` in children of a helper process and kills them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fit_and_kill.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *words: object, moment: int | None = None, seconds: float | None = None
    ) -> tuple[int, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"words": [str(word) for word in words], "moment": moment, "seconds": seconds}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["text"]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
