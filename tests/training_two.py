"""Trains the toy in so many processes for test_training_loop.py: training_two.py FOLDER N."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_toy import Toy, source

from allgood.training.config import TrainConfig
from allgood.training.loop import train
from allgood.training.runtime import open_fabric

CONFIG = TrainConfig(steps=20, batch_size=8, warmup_steps=3, checkpoint_steps=6, log_steps=4)


def run(folder: Path, devices: int, accumulate: int = 1) -> Toy:
    model = Toy(dropout=0)
    fabric = open_fabric(device="cpu", devices=devices)
    config = replace(CONFIG, accumulate=accumulate)
    train(
        model, source(unreadable=[2], augmented=True), config, fabric=fabric, folder=folder, seed=4
    )
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
