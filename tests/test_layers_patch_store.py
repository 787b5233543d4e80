"""The store of patches: its budget, its choice of rows, and what a kill at any moment leaves."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allgood.layers.patch_store import PatchStore
from allgood.types import Failure

C, G = 6, 4
IDS = [f"wood/{i:03}.png" for i in range(12)]


def patches_of(id: str, count: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(IDS.index(id))
    return torch.randn(count, C, generator=generator)


def add(store: PatchStore, ids: Sequence[str], count: int = 30) -> None:
    numbers = torch.tensor([IDS.index(id) for id in ids])
    store.add(
        ids,
        [patches_of(id, count) for id in ids],
        numbers % 3,
        numbers[:, None].repeat(1, G).float(),
    )


def opened(folder: Path, rows_per_image: int = 10, seed: int = 0) -> PatchStore:
    budget = len(IDS) * rows_per_image * C * 4
    return PatchStore(folder, num_images=len(IDS), budget_bytes=budget, seed=seed)


def test_everything_comes_back_within_the_budget(tmp_path: Path) -> None:
    store = opened(tmp_path, rows_per_image=30)
    for i in range(0, 12, 5):
        add(store, IDS[i : i + 5])
    patches, category = store.patches()
    assert torch.equal(patches, torch.cat([patches_of(id) for id in IDS]))
    assert torch.equal(category, (torch.arange(12) % 3).repeat_interleave(30))
    features, image_category = store.global_features()
    assert torch.equal(features, torch.arange(12.0)[:, None].repeat(1, G))
    assert torch.equal(image_category, torch.arange(12) % 3)
    assert store.seen_rows == 360


@pytest.mark.parametrize("limit", [1, 7, 29])
def test_budget_limits_the_rows_of_each_image(tmp_path: Path, limit: int) -> None:
    store = opened(tmp_path, limit)
    assert store.rows_per_image(C) == limit
    add(store, IDS)
    patches, category = store.patches()
    assert len(patches) == len(category) == 12 * limit and store.seen_rows == 360
    assert patches.numel() * 4 <= 12 * limit * C * 4
    for id, kept in zip(IDS, patches.split(limit), strict=True):
        where = (patches_of(id)[None] == kept[:, None]).all(dim=2).nonzero()[:, 1]
        assert len(where) == limit and (where.diff() > 0).all()  # true rows, in their order


def test_of_images_that_are_not_kept_there_is_the_global_feature(tmp_path: Path) -> None:
    # The category counts too: ids are unique within one only.
    only = {(i % 3, IDS[i]) for i in (1, 5, 6)} | {(2, IDS[0])}
    store = PatchStore(tmp_path, num_images=3, only=only, budget_bytes=3 * 20 * C * 4)
    add(store, IDS)
    _, category = store.patches()
    assert category.tolist() == [1] * 20 + [2] * 20 + [0] * 20  # as many of each as three may have
    assert store.seen_rows == 90
    assert len(store.global_features()[0]) == 12


def test_at_least_one_row(tmp_path: Path) -> None:
    store = PatchStore(tmp_path, num_images=1000, budget_bytes=10)
    add(store, IDS[:2])
    assert len(store.patches()[0]) == 2


def test_choice_depends_on_id_and_seed_alone(tmp_path: Path) -> None:
    def kept(name: str, order: list[str], batch: int, seed: int = 0) -> dict[str, Tensor]:
        store = opened(tmp_path / name, seed=seed)
        for i in range(0, len(order), batch):
            add(store, order[i : i + batch])
        return dict(zip(order, store.patches()[0].split(10), strict=True))

    first = kept("a", IDS, 12)
    other_order = kept("b", IDS[::-1], 5)
    assert all(torch.equal(first[id], other_order[id]) for id in IDS)
    other_seed = kept("c", IDS, 12, seed=1)
    assert not any(torch.equal(first[id], other_seed[id]) for id in IDS)
    picked = {tuple((patches_of(id)[:, :1] == first[id][:, 0]).any(1).tolist()) for id in IDS}
    assert len(picked) == len(IDS)  # not the same positions in every image


@pytest.mark.parametrize("killed_after", [0, 1, 3])
@pytest.mark.parametrize("lost", ["garbage", "a batch", "half a batch"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, killed_after: int, lost: str
) -> None:
    batches = [IDS[i : i + 3] for i in range(0, 12, 3)]
    whole = opened(tmp_path / "whole")
    for number, batch in enumerate(batches, start=1):
        add(whole, batch)
        whole.commit(3 * number, [])

    store = opened(tmp_path / "killed")
    for number, batch in enumerate(batches[:killed_after], start=1):
        add(store, batch)
        store.commit(3 * number, [])
    if lost == "garbage":
        for file in (tmp_path / "killed").glob("p*.*"):
            with file.open("ab") as stream:
                stream.write(b"\xff" * 1001)
        (tmp_path / "killed" / "committed.tmp").write_text("{half a")
    else:
        add(store, batches[killed_after][: 3 if lost == "a batch" else 1])

    again = opened(tmp_path / "killed")
    assert again.position == 3 * killed_after and again.seen_rows == 90 * killed_after
    for number, batch in enumerate(batches[killed_after:], start=killed_after + 1):
        add(again, batch)
        again.commit(3 * number, [])
    for ours, theirs in zip(
        (*again.patches(), again.patch_images(), *again.global_features()),
        (*whole.patches(), whole.patch_images(), *whole.global_features()),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    assert again.seen_rows == whole.seen_rows


def test_nothing_counts_before_commit(tmp_path: Path) -> None:
    store = opened(tmp_path)
    add(store, IDS[:3])
    assert len(opened(tmp_path).patches()[0]) == 0
    store.commit(3, [])
    assert len(opened(tmp_path).patches()[0]) == 30


def test_empty_store_and_images_without_patches(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert [len(x) for x in (*store.patches(), store.patch_images())] == [0, 0, 0]
    assert [len(x) for x in store.global_features()] == [0, 0]
    store.add(IDS[:1], [torch.empty(0, C)], torch.tensor([0]), torch.zeros(1, G))
    assert store.patches()[0].shape == (0, C) and len(store.global_features()[0]) == 1


def test_rows_know_their_image(tmp_path: Path) -> None:
    store = opened(tmp_path)
    add(store, [IDS[0], IDS[1], IDS[0]])  # a rotated copy has its picture's id
    first, second, third = store.patch_images().split(10)
    assert len(first.unique()) == len(second.unique()) == 1
    assert torch.equal(first, third) and first[0] != second[0]
    assert first[0] == 5338872421522192877  # the same number in every process


def test_failures_are_kept(tmp_path: Path) -> None:
    failures = [Failure(Path("wood/x y.png"), "not a picture"), Failure(Path("z.png"), "empty")]
    opened(tmp_path).commit(7, failures)
    again = opened(tmp_path)
    assert again.position == 7 and again.failures == failures
