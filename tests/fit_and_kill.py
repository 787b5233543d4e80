"""The helper process of killing.py: runs commands in children that are killed at a given moment.

Reads one JSON object a line, {"words": [...], "moment": n, "seconds": s}, and answers with one. A
child is killed with SIGKILL just before (even n) or just after (odd n) its n // 2-th renaming of a
file, which is how everything in a run's folder comes to be, or after s seconds; null: never.
Loading torch once and forking saves the import for every child.
"""

import json
import os
import signal
import sys
import time

import torch
import tyro  # noqa: F401

import allgood.detectors.dinomaly
import allgood.detectors.patchcore
import allgood.fitting.job
import allgood.inference
import allgood.learning  # noqa: F401
from allgood.cli import main


def child(words: list[str], moment: int | None, log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    rename, count = os.replace, 0

    def counted(source: object, target: object) -> None:
        nonlocal count
        if moment is not None and moment % 2 == 0 and count == moment // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if moment is not None and moment % 2 == 1 and count == moment // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    os.replace = counted
    code = main(words)
    print(f"renamed {count} files")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    request = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(request["words"], request["moment"], write)
    os.close(write)
    if request["seconds"] is not None:
        time.sleep(request["seconds"])
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "text": text}), flush=True)
