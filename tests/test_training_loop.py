"""The training loop: it learns, and a killed one ends with the weights of an undisturbed one."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_kill
import training_two
from torch import Tensor
from training_toy import COUNT, Toy, source

from allgood.training import checkpoint, loop
from allgood.training.config import TrainConfig
from allgood.training.feature_cache import CachedFeatures
from allgood.training.loop import train
from allgood.training.runtime import join_norms, open_fabric, require_joint_norms, seed_step
from allgood.types import InputError

CONFIG = TrainConfig(steps=12, batch_size=4, warmup_steps=2, checkpoint_steps=5, log_steps=3)


@pytest.fixture(scope="module")
def fabric() -> Any:
    return open_fabric(device="cpu")


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    """Bit by bit, buffers included."""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Stop(Exception):
    """What ends a training in the middle."""


def stop_at(model: Toy, step: int) -> Toy:
    """The model's loss raises at that step."""
    training_loss = model.training_loss

    def raising(batch: Any, now: int) -> Tensor:
        if now == step:
            raise Stop
        return training_loss(batch, now)

    model.training_loss = raising  # type: ignore[method-assign]
    return model


class Killer:
    """Trains in children of one helper process; see training_kill.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, training_kill.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self,
        folder: Path,
        *,
        moment: int | None = None,
        seconds: float | None = None,
        devices: int = 0,
    ) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"folder": str(folder), "moment": moment, "seconds": seconds, "devices": devices}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert answer["code"] in (0, -9), answer["text"]
        self.text = answer["text"]
        return answer["code"]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module", autouse=True)  # so its imports go on beside the first tests
def killer() -> Iterator[Killer]:
    killer = Killer()
    yield killer
    killer.close()


# -- learning ------------------------------------------------------------------------------------


def test_loss_falls_and_all_that_is_learned_changes(fabric: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=300, learning_rate=0.02, log_steps=50, checkpoint_steps=None)
    model, before = Toy(), Toy().state_dict()
    train(model, source(), config, fabric=fabric, folder=tmp_path)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [50, 100, 150, 200, 250, 300]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["learning_rate"] == pytest.approx(2e-4, rel=0.1)
    assert all(line["images_per_second"] > 0 for line in log)
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed == {name for name in before if not name.startswith("encoder.")}
    assert not model.training
    assert model.prepared == 1


def test_bf16_trains(fabric: Any, tmp_path: Path) -> None:
    bf16 = open_fabric(device="cpu", precision="bf16")
    seen = []
    model = Toy()

    def look(batch: Any, step: int) -> Tensor:
        seen.append((batch.features[0].dtype, model.mix(batch.features[0]).dtype))
        return Toy.training_loss(model, batch, step)

    model.training_loss = look  # type: ignore[method-assign]
    config = replace(CONFIG, precision="bf16")
    train(model, source(), config, fabric=bf16, folder=tmp_path / "bf16")
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    exact = Toy()
    train(exact, source(), CONFIG, fabric=fabric, folder=tmp_path / "fp32")
    assert not same(model, exact)
    assert model.mix.weight.dtype == torch.float32
    torch.testing.assert_close(model.mix.weight, exact.mix.weight, atol=0.01, rtol=0.1)


def test_accumulation_changes_rounding_only(tmp_path: Path) -> None:
    one = training_two.run(tmp_path / "1", 1)
    four = training_two.run(tmp_path / "4", 1, accumulate=4)
    torch.testing.assert_close(one.state_dict(), four.state_dict(), atol=2e-5, rtol=1e-3)
    for a, b in zip(log_of(tmp_path / "1"), log_of(tmp_path / "4"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_two_processes_equal_one(killer: Killer, tmp_path: Path) -> None:
    assert killer(tmp_path / "2", devices=2) == 0
    assert killer.text == "training: 20\n"
    one = training_two.run(tmp_path / "1", 1)
    two = Toy(dropout=0)
    optimizer = torch.optim.Adam(two.parameters())
    found = checkpoint.load(tmp_path / "2", two, optimizer)
    assert found is not None
    assert found[0].step == 20
    torch.testing.assert_close(one.state_dict(), two.state_dict(), atol=2e-5, rtol=1e-3)
    for a, b in zip(log_of(tmp_path / "1"), log_of(tmp_path / "2"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_processes_on_gpus_have_one_batch_norm() -> None:
    model = Toy()
    model.encoder = torch.nn.BatchNorm2d(3)
    before = model.state_dict(keep_vars=True)
    join_norms(model)
    assert isinstance(model.norm, torch.nn.SyncBatchNorm)
    assert isinstance(model.encoder, torch.nn.BatchNorm2d)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)  # what the optimizer trains


def test_processes_on_cpus_have_none() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    require_joint_norms(Toy(dropout=0), cpu)
    require_joint_norms(Toy(), gpu)
    with pytest.raises(InputError, match="batch norm cannot be trained by several processes on CP"):
        require_joint_norms(Toy(), cpu)


def test_compile_is_asked_for(fabric: Any, tmp_path: Path, monkeypatch: Any) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    train(Toy(), source(), replace(CONFIG, compile=True), fabric=fabric, folder=tmp_path)
    assert [function.__name__ for function in compiled] == ["training_loss"]


def test_convolutions_are_channels_last(fabric: Any, tmp_path: Path) -> None:
    flat, solid = Toy(), Toy()
    solid.volume = torch.nn.Conv3d(1, 1, 2).requires_grad_(False)
    for name, model in (("flat", flat), ("solid", solid)):
        train(model, source(), CONFIG, fabric=fabric, folder=tmp_path / name)
    assert flat.mix.weight.is_contiguous(memory_format=torch.channels_last)
    assert not solid.mix.weight.is_contiguous(memory_format=torch.channels_last)


# -- pictures that cannot be read ----------------------------------------------------------------


def test_unreadable_pictures_are_left_out_of_the_order(fabric: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    model = Toy()

    def look(batch: Any, step: int) -> Tensor:
        assert len(batch.index) == 4
        seen.extend(batch.index.tolist())
        return Toy.training_loss(model, batch, step)

    model.training_loss = look  # type: ignore[method-assign]
    pictures = source(unreadable=[0, 1, 2, 3, 17])  # the whole first batch, and one more
    left_out = train(model, pictures, CONFIG, fabric=fabric, folder=tmp_path)
    assert set(seen) == set(range(COUNT)) - {0, 1, 2, 3, 17}
    assert sorted(left_out) == [0, 1, 2, 3, 17]
    again = source()  # whose reader has not met them yet
    assert train(Toy(), again, CONFIG, fabric=fabric, folder=tmp_path) == left_out


def test_what_is_left_out_is_checked_before_the_first_step(fabric: Any, tmp_path: Path) -> None:
    def refuse(unreadable: Any) -> None:
        assert sorted(unreadable) == [0, 6]  # pictures, not their views
        raise Stop

    pictures = source(unreadable=[0, 6], augmented=True)
    with pytest.raises(Stop):
        train(
            stop_at(Toy(nan_at=0), 0),
            pictures,
            CONFIG,
            fabric=fabric,
            folder=tmp_path,
            check=refuse,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_read_that_fails_in_passing(fabric: Any, tmp_path: Path) -> None:
    """Others stand in for the picture, so that no process waits for a larger share; and it counts
    as learned."""
    gone: list[int] = []
    model, shapes = Toy(), []

    def look(batch: Any, step: int) -> Tensor:
        rows = batch.index.tolist()
        shapes.append((len(rows), len(batch.category), *map(len, batch.features)))
        assert torch.equal(batch.category, batch.index % 3)
        missed.append(len(set(rows)) < len(rows))
        gone[:] = [[], range(10)][step == 3]  # of what is read after this step
        return Toy.training_loss(model, batch, step)

    missed: list[bool] = []
    model.training_loss = look  # type: ignore[method-assign]
    left_out = train(model, source(unreadable=gone), CONFIG, fabric=fabric, folder=tmp_path)
    assert set(shapes) == {(4, 4, 4, 4)} and any(missed)
    assert left_out == {}
    assert json.loads((tmp_path / "checkpoint.json").read_text())["unreadable"] == {}


def test_nothing_can_be_read(fabric: Any, tmp_path: Path) -> None:
    class Indifferent(Toy):
        def prepare(self, batches: Any) -> None:
            pass

    model, pictures = Indifferent(), source(count=3, unreadable=[0, 1, 2])
    with pytest.raises(InputError, match="no training picture could be read"):
        train(model, pictures, CONFIG, fabric=fabric, folder=tmp_path)
    with pytest.raises(InputError, match="no training picture could be read"):
        train(Toy(), pictures, CONFIG, fabric=fabric, folder=tmp_path)


def test_pictures_vanish_during_training(fabric: Any, tmp_path: Path) -> None:
    gone: list[int] = []
    pictures = source(unreadable=gone)
    model = Toy()

    def look(batch: Any, step: int) -> Tensor:
        if step == 3:
            gone.extend(range(COUNT))
        return Toy.training_loss(model, batch, step)

    model.training_loss = look  # type: ignore[method-assign]
    with pytest.raises(OSError, match="can be read any more"):
        train(model, pictures, CONFIG, fabric=fabric, folder=tmp_path)


# -- views ---------------------------------------------------------------------------------------


def rows_seen(fabric: Any, folder: Path, pictures: Any, seed: int = 1, **settings: Any) -> Any:
    """What each micro-batch of a training saw, after `prepare`: rows and first features."""
    seen: list[tuple[list[int], Tensor]] = []
    model = Toy()

    def look(batch: Any, step: int) -> Tensor:
        seen.append((batch.index.tolist(), batch.features[0]))
        return Toy.training_loss(model, batch, step)

    model.training_loss = look  # type: ignore[method-assign]
    config = replace(CONFIG, **settings)
    train(model, pictures, config, fabric=fabric, folder=folder, seed=seed)
    return seen


def test_views_change_neither_the_order_nor_the_preparation(fabric: Any, tmp_path: Path) -> None:
    reads: list[list[int]] = []
    augmented = source(augmented=True, reads=reads)
    views = rows_seen(fabric, tmp_path / "views", augmented, steps=40)
    assert sorted(i for batch in reads[:6] for i in batch) == list(range(COUNT))
    plain = rows_seen(fabric, tmp_path / "plain", source(), steps=40)
    picture_of = {row: i for i in range(COUNT) for row in augmented.views.rows(i)}
    assert [[picture_of[row] for row in rows] for rows, _ in views] == [rows for rows, _ in plain]
    mirrored = sum(row >= COUNT for rows, _ in views for row in rows)
    of_category = sum(picture_of[row] % 3 == 0 for rows, _ in views for row in rows)
    assert 0.1 < mirrored / of_category < 0.5
    # A picture is not seen in the same view in each epoch.
    of_first = [row for rows, _ in views for row in rows if picture_of[row] == 0]
    assert set(of_first) == set(augmented.views.rows(0))
    other = rows_seen(fabric, tmp_path / "seed", source(augmented=True), seed=2, steps=40)
    assert [rows for rows, _ in other] != [rows for rows, _ in views]


def test_the_cache_changes_no_view(fabric: Any, tmp_path: Path) -> None:
    pictures = source(augmented=True, unreadable=[6])
    online = rows_seen(fabric, tmp_path / "online", pictures)
    cache = CachedFeatures(
        tmp_path / "cache", {}, source(augmented=True, unreadable=[6]), quiet=True
    )
    cached = rows_seen(fabric, tmp_path / "cached", cache)
    for (rows, features), (cached_rows, cached_features) in zip(online, cached, strict=True):
        assert rows == cached_rows
        assert not {6, COUNT + 2} & set(rows)
        torch.testing.assert_close(cached_features, features, atol=2e-3, rtol=1e-3)


def test_processes_and_micro_batches_share_the_same_views() -> None:
    """Of a step, whoever reads it, and wherever the training is taken up again."""
    pictures = source(augmented=True)

    def steps(world: int, accumulate: int, start: int) -> list[list[int]]:
        config = replace(CONFIG, batch_size=8, accumulate=accumulate)
        ranks = [
            list(
                loop._order(
                    pictures,
                    config,
                    checkpoint.Position(step=start),
                    SimpleNamespace(global_rank=rank, world_size=world),  # type: ignore[arg-type]
                    seed=5,
                )
            )
            for rank in range(world)
        ]
        return [
            [
                row
                for micro in range(accumulate)
                for rank in range(world)
                for row in ranks[rank][step * accumulate + micro]
            ]
            for step in range(config.steps - start)
        ]

    whole = steps(1, 1, 0)
    assert any(row >= COUNT for rows in whole for row in rows)
    for world, accumulate in ((2, 1), (1, 4), (2, 2)):
        for start in (0, 5, 11):
            assert steps(world, accumulate, start) == whole[start:]


# -- kill and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "augmented"), [("stable_adamw", False), ("adamw", False), ("adamw", True)]
)
def test_stopped_at_any_step(fabric: Any, tmp_path: Path, optimizer: str, augmented: bool) -> None:
    """Before, at and after a checkpoint, which stand behind steps 4, 9 and 11."""
    config = replace(CONFIG, optimizer=optimizer)
    pictures = source(augmented=augmented)
    undisturbed = Toy()
    train(undisturbed, pictures, config, fabric=fabric, folder=tmp_path / "undisturbed")
    folder = tmp_path / "stopped"
    for step in (1, 4, 5, 6, 9, 11):
        with pytest.raises(Stop):
            train(stop_at(Toy(), step), pictures, config, fabric=fabric, folder=folder)
    model = Toy()
    train(model, pictures, config, fabric=fabric, folder=folder)
    assert model.prepared == 0
    assert same(model, undisturbed)
    assert [line["step"] for line in log_of(folder)] == [3, 6, 9, 12]
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "log.jsonl",
        "weights-12.safetensors",
    ]
    finished = stop_at(Toy(), 0)  # a kill after the training does not train again
    train(finished, pictures, config, fabric=fabric, folder=folder)
    assert not finished.training
    assert same(finished, undisturbed)


def test_stopped_between_the_two_files(fabric: Any, tmp_path: Path, monkeypatch: Any) -> None:
    undisturbed = Toy()
    train(undisturbed, source(), CONFIG, fabric=fabric, folder=tmp_path / "undisturbed")

    def no_pointer(path: Path, data: Any) -> None:
        if data["step"] == 10:
            raise Stop

        original(path, data)

    original = checkpoint.write_json
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, "write_json", no_pointer)
        train(Toy(), source(), CONFIG, fabric=fabric, folder=tmp_path)
    assert (tmp_path / "weights-5.safetensors").exists()
    assert (tmp_path / "weights-10.safetensors").exists()
    model = Toy()
    train(model, source(), CONFIG, fabric=fabric, folder=tmp_path)
    assert same(model, undisturbed)


def test_killed_again_and_again(killer: Killer, tmp_path: Path) -> None:
    """Seven blocks of the cache and eight checkpoints of two files: 23 renamings."""
    undisturbed = training_kill.run(tmp_path / "undisturbed")
    moments = random.Random(2)
    kills = 0
    while killer(tmp_path / "killed", moment=moments.randrange(2, 11)) == -9:
        kills += 1
    assert kills >= 4
    killer(tmp_path / "clock", seconds=0.25)
    killer(tmp_path / "clock", seconds=0.4)
    for name in ("killed", "clock"):
        folder = tmp_path / name
        model = training_kill.run(folder)
        assert same(model, undisturbed)
        for path in sorted((folder / "cache").rglob("*.*")):
            expected = tmp_path / "undisturbed" / path.relative_to(folder)
            assert path.read_bytes() == expected.read_bytes(), path
        assert not list(folder.rglob("*.tmp"))


def test_damaged_checkpoint_starts_again(fabric: Any, tmp_path: Path, capsys: Any) -> None:
    undisturbed = Toy()
    train(undisturbed, source(), CONFIG, fabric=fabric, folder=tmp_path)
    weights = tmp_path / "weights-12.safetensors"
    damages = [
        weights.unlink,
        lambda: os.truncate(weights, 100),
        lambda: (tmp_path / "checkpoint.json").write_text("{"),
    ]
    for damage in damages:
        damage()
        model = Toy()
        train(model, source(), CONFIG, fabric=fabric, folder=tmp_path)
        assert same(model, undisturbed)
        assert model.prepared == 1
        assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 9, 12]
        assert f"the checkpoint in {tmp_path} is damaged" in capsys.readouterr().err


def test_checkpoint_of_another_model(fabric: Any, tmp_path: Path) -> None:
    train(Toy(), source(), CONFIG, fabric=fabric, folder=tmp_path)
    with pytest.raises(InputError, match="is of another model"):
        train(Toy(dropout=0), source(), CONFIG, fabric=fabric, folder=tmp_path)


def test_checkpoint_leaves_the_encoder_out(fabric: Any, tmp_path: Path) -> None:
    train(Toy(), source(), CONFIG, fabric=fabric, folder=tmp_path)
    stored = checkpoint.read_weights(tmp_path / "weights-12.safetensors")
    assert not [name for name in stored if "encoder" in name]
    assert {"mix.weight", "norm.running_mean", "reference"} <= stored.keys()
    assert "optimizer/max_exp_avg_sq/mix.weight" in stored


def test_checkpoint_by_the_clock(fabric: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_steps=None, checkpoint_minutes=1e-9)
    with pytest.raises(Stop):
        train(stop_at(Toy(), 8), source(), config, fabric=fabric, folder=tmp_path / "often")
    assert (tmp_path / "often" / "weights-8.safetensors").exists()
    config = replace(CONFIG, checkpoint_steps=None)
    with pytest.raises(Stop):
        train(stop_at(Toy(), 8), source(), config, fabric=fabric, folder=tmp_path / "rarely")
    assert not (tmp_path / "rarely" / "checkpoint.json").exists()


def test_fp16_goes_on_with_its_scaler(tmp_path: Path) -> None:
    """Fabric allows fp16 on a GPU only, so its plugin is handed in; the scale grows and shrinks."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    def scaled() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=3)
        return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))

    undisturbed, model = Toy(), Toy()
    train(undisturbed, source(), CONFIG, fabric=scaled(), folder=tmp_path / "undisturbed")
    for step in (6, 11):
        with pytest.raises(Stop):
            train(stop_at(Toy(), step), source(), CONFIG, fabric=scaled(), folder=tmp_path)
    train(model, source(), CONFIG, fabric=scaled(), folder=tmp_path)
    assert same(model, undisturbed)
    ends = [
        json.loads((folder / "checkpoint.json").read_text())
        for folder in (tmp_path, tmp_path / "undisturbed")
    ]
    assert ends[0] == ends[1] | {"log_bytes": ends[0]["log_bytes"]}
    assert ends[0]["scaler"]["scale"] != 2.0**26
    assert ends[0]["optimizer_steps"][0] < CONFIG.steps  # the scaler left some out


def test_scaler_is_kept(fabric: Any, tmp_path: Path) -> None:
    model = Toy()
    optimizer = torch.optim.Adam(model.parameters())
    state = {"scale": 1024.5, "_growth_tracker": 3}
    checkpoint.save(tmp_path, model, optimizer, checkpoint.Position(3), scaler=state)
    assert checkpoint.load(tmp_path, model, optimizer) == (checkpoint.Position(3), state)


# -- what goes wrong -----------------------------------------------------------------------------


def test_nan_names_its_step(fabric: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        train(Toy(nan_at=7), source(), CONFIG, fabric=fabric, folder=tmp_path)
    assert str(caught.value) == (
        "the loss became NaN at step 7: lower the learning rate with --train learning_rate=0.0002"
    )
    pointer = json.loads((tmp_path / "checkpoint.json").read_text())
    assert pointer["step"] == 5  # the state after the bad step was not kept
    bf16 = replace(CONFIG, precision="bf16")
    with pytest.raises(InputError, match=r"or train in fp32 with --train precision=fp32$"):
        train(Toy(nan_at=0), source(), bf16, fabric=fabric, folder=tmp_path / "bf16")


def test_state_with_nan_is_never_kept(fabric: Any, tmp_path: Path) -> None:
    """The last update may break the weights with no loss after it to show that."""

    def breaking(model: Toy, where: str) -> Toy:
        def loss(batch: Any, step: int) -> Tensor:
            value = Toy.training_loss(model, batch, step)
            if step == 4 and where == "gradient":
                value.register_hook(lambda gradient: gradient * float("nan"))
            if step == 4 and where == "buffer":
                model.reference[0] = float("nan")
            return value

        model.training_loss = loss  # type: ignore[method-assign]
        return model

    for where, named in (("gradient", "mix.weight"), ("buffer", "reference")):
        folder = tmp_path / where
        with pytest.raises(InputError, match=f"'{named}' became NaN or infinite before step 5"):
            train(breaking(Toy(), where), source(), CONFIG, fabric=fabric, folder=folder)
        assert not (folder / "checkpoint.json").exists()


def test_infinite_buffer_is_a_mask(fabric: Any, tmp_path: Path) -> None:
    model = Toy()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    train(model, source(), CONFIG, fabric=fabric, folder=tmp_path)
    assert (tmp_path / "checkpoint.json").exists()


# -- surroundings --------------------------------------------------------------------------------


def test_seeds_do_not_leak(fabric: Any, tmp_path: Path) -> None:
    one, two, pictures = Toy(), stop_at(Toy(), 3), source()
    before = torch.get_rng_state()
    train(one, pictures, CONFIG, fabric=fabric, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Stop):
        train(two, pictures, CONFIG, fabric=fabric, folder=tmp_path / "stopped")
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_decides(fabric: Any, tmp_path: Path) -> None:
    models = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # where the caller's generator stands has no part in it
        models.append(Toy())
        train(models[-1], source(), CONFIG, fabric=fabric, folder=tmp_path / name, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_seed_step_is_a_pure_function() -> None:
    with torch.random.fork_rng():
        numbers = set()
        places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
        for seed, step, rank, micro in places * 2:
            seed_step(seed, step, rank=rank, micro=micro)
            numbers.add(torch.rand(()).item())
        assert len(numbers) == len(places)


def test_tensorboard_gets_the_log(tmp_path: Path) -> None:
    fabric = open_fabric(device="cpu", tensorboard=tmp_path / "board")
    train(Toy(), source(), CONFIG, fabric=fabric, folder=tmp_path)
    (events,) = (tmp_path / "board").glob("events.out.tfevents.*")
    content = events.read_bytes()
    for name in (b"loss", b"learning_rate", b"images_per_second"):
        assert content.count(name) >= 4


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("lightning_fabric", r"training needs the package lightning_fabric: pip install 'allgood"),
        ("lightning_fabric.loggers", r"pip install 'allgood\[train\]'$"),
    ],
)
def test_missing_packages(missing: str, said: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=said):
        open_fabric(device="cpu", tensorboard=tmp_path)


def test_missing_tensorboard(monkeypatch: Any, tmp_path: Path) -> None:
    from lightning_fabric.loggers import tensorboard

    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    with pytest.raises(InputError, match=r"tensorboard or tensorboardX: pip install 'allgood"):
        open_fabric(device="cpu", tensorboard=tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "tpu"}, "device 'tpu' is not one of auto, cpu, cuda"),
        ({"device": "cpu:1"}, "device 'cpu:1' is not one of"),
        ({"device": "cuda:99"}, "this machine has"),
        ({"device": "cuda:1", "devices": 2}, "is one GPU, but 2 devices are asked for"),
        ({"device": "cpu", "precision": "fp16"}, "precision fp16 needs a GPU"),
    ],
)
def test_devices_that_are_not_there(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_fabric(**settings)


def test_light_commands_read_the_settings_without_torch() -> None:
    code = "import sys, allgood.training.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_log_is_where_it_says(fabric: Any, tmp_path: Path) -> None:
    train(Toy(), source(), CONFIG, fabric=fabric, folder=tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / loop.LOG).exists()
