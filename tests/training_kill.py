"""A helper process of test_training_loop.py: trains the toy in children that are killed.

Reads one JSON object a line, {"folder": "...", "moment": n, "seconds": s}, and answers with the
child's exit code and text. A child is killed with SIGKILL just before (even n) or just after (odd
n) its n // 2-th renaming of a file, or after s seconds; null: never. With "devices" it is never
killed and trains as training_two.py does. The import is paid once.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import training_two
from training_toy import Toy, source

from allgood.training.config import TrainConfig
from allgood.training.feature_cache import CachedFeatures
from allgood.training.loop import train
from allgood.training.runtime import open_fabric

CONFIG = TrainConfig(
    steps=30, batch_size=4, accumulate=2, warmup_steps=3, checkpoint_steps=4, log_steps=5
)


def run(folder: Path, seed: int = 1) -> Toy:
    """What the test does undisturbed, and the children until they are killed."""
    fabric = open_fabric(device="cpu")
    model = Toy()
    cached = CachedFeatures(
        folder / "cache",
        {"data": "toy"},
        source(unreadable=[6], augmented=True),
        block=4,
        batch_size=2,
    )
    train(model, cached, CONFIG, fabric=fabric, folder=folder / "training", seed=seed)
    return model


def child(folder: Path, moment: int | None, devices: int, log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if devices:
        sys.argv = [training_two.__file__, str(folder), str(devices)]  # what Fabric starts again
        training_two.run(folder, devices)
        os._exit(0)
    rename, count = os.replace, 0

    def counted(before: str, after: str) -> None:
        nonlocal count
        if moment is not None and moment == 2 * count:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(before, after)
        if moment is not None and moment == 2 * count + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    os.replace = counted
    run(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    import lightning_fabric  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                child(Path(request["folder"]), request["moment"], request["devices"], write)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(write)
        if request["seconds"] is not None:
            time.sleep(request["seconds"])
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(read) as stream:
            text = stream.read()
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "text": text}), flush=True)
