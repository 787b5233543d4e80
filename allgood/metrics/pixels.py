"""PixelState: every pixel metric of a test set from one pass over its maps, mergeable.

Two stores hold the pixels. A paged histogram (histogram.py) counts all of them. The highest scoring
`exact_pixels` are also kept one by one, because there lie the steep start of the precision-recall
curve, the threshold of F1max and the threshold of DSC. Metrics see the ranking as exact groups from
the top store followed by bins from the histogram (ranking.py), and come with guaranteed bounds.

In the top store (top_store.py) a pixel carries its owner: one per image for its normal pixels and
one per region, which tells the region's weight. DSC alone needs counts per image at a threshold
that is known at the end: for it the maps are kept as they are (map_store.py).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import ndimage

from allgood.metrics.dsc import dsc
from allgood.metrics.histogram import (
    KEY_END,
    Bins,
    Keys,
    PagedHistogram,
    key_scores,
    score_keys,
)
from allgood.metrics.map_store import MapStore
from allgood.metrics.ranking import (
    Floats,
    Groups,
    Integers,
    Metric,
    aupro,
    auroc,
    average_precision,
    best_f1,
    curves_of,
)
from allgood.metrics.top_store import Entries, TopStore, make_entries
from allgood.types import InputError

WEIGHT_ONE = 1 << 44
"""Fixed-point 1 of region weights: integers make sums exact in any order. Room for 2^19 regions."""
_MAX_REGIONS = 1 << 19
_CHUNK = 1 << 16  # pixels whose keys and slots stay in a core's cache
_FORMAT = "allgood.PixelState 2"  # name and version
_SETTINGS = ("exact", "exact_pixels", "max_bins", "with_dsc")
_EIGHT_CONNECTED = np.ones((3, 3), np.int32)


class PixelState:
    """Streaming pixel metrics of one category, or of several merged ones.

    The same data give an equal state, and so the same numbers to the last bit, for any order of
    images, any batches and any tree of merges.

    Args:
        exact: keep all pixels (8 bytes each) and no histogram; then every bound is 0.
        exact_pixels: how many of the highest scores are kept exactly otherwise (12 bytes each).
        max_bins: budget of the histogram (24 bytes each).
        with_dsc: measure DSC too, which keeps every map in a temporary file, 4 bytes per pixel.
    """

    def __init__(
        self,
        *,
        exact: bool = False,
        exact_pixels: int = 1 << 20,
        max_bins: int = 1 << 18,
        with_dsc: bool = True,
    ) -> None:
        if exact_pixels < 0:
            raise ValueError(f"exact_pixels must not be negative, got {exact_pixels}")
        self.exact = exact
        self.exact_pixels = exact_pixels
        self.max_bins = max_bins
        self.with_dsc = with_dsc
        self._maps = MapStore()
        self._histogram = PagedHistogram(max_bins)
        self._top = TopStore(None if exact else exact_pixels)
        self._image_ids: dict[str, int] = {}
        self._image_pixels: list[int] = []
        self._image_positives: list[int] = []
        self._owner_weight: list[int] = []  # 0 for the normal pixels of an image
        self._owner_image: list[int] = []

    @property
    def num_images(self) -> int:
        return len(self._image_ids)

    @property
    def num_regions(self) -> int:
        return len(self._owner_image) - self.num_images

    @property
    def normal_pixels(self) -> int:
        return sum(self._image_pixels) - self.defective_pixels

    @property
    def defective_pixels(self) -> int:
        return sum(self._image_positives)

    def update(
        self, maps: ArrayLike, masks: ArrayLike, image_ids: Sequence[str] | None = None
    ) -> None:
        """Add images. Images whose mask is unknown must be left out by the caller.

        Args:
            maps: (B, H, W) or (H, W) anomaly scores, any range; rounded to float32.
            masks: same shape, nonzero where defective; all zero for a good image.
            image_ids: B names, unique in the test set; by default the running number, which will
                not do for states that are to be merged.

        Raises:
            InputError: shapes or counts differ, a map holds NaN, or an image was already added.
                Nothing has been added then.
        """
        scores, mask = _as_maps(maps), _as_maps(masks)
        if scores.shape != mask.shape:
            raise InputError(
                f"maps have shape {scores.shape} but masks {mask.shape}: resize one to the other"
            )
        count = len(scores)
        if image_ids is None:
            image_ids = [str(self.num_images + i) for i in range(count)]
        elif len(image_ids) != count:
            raise InputError(f"{count} maps came with {len(image_ids)} image_ids: give one each")
        self._refuse_known(image_ids)
        if len(set(image_ids)) < count:
            raise InputError("an image id occurs twice in one update: give each image its own")
        if scores.size and scores.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                is_nan = np.isnan(scores.reshape(count, -1).max(axis=1))  # NaN if any pixel is
            if is_nan.any():
                name = image_ids[int(np.argmax(is_nan))]
                raise InputError(f"the anomaly map of image {name!r} holds NaN: check its detector")
        for one_map, one_mask, name in zip(scores, mask, image_ids, strict=True):
            self._add_image(_as_float32(one_map), one_mask != 0, name)

    def merge(self, other: "PixelState") -> None:
        """Add all images of another state with the same settings, in place.

        A state without DSC takes those of states with it too.

        Raises:
            InputError: settings differ, or an image is in both states.
        """
        for name in _SETTINGS:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and not (name == "with_dsc" and theirs):
                raise InputError(
                    f"states with {name}={ours} and {name}={theirs} cannot be merged: use one value"
                )
        self._refuse_known(list(other._image_ids))
        other._raise_cut()
        first_image, first_owner = self.num_images, len(self._owner_image)
        self._check_regions(other.num_regions)
        self._histogram.merge(other._histogram)
        if self.with_dsc:
            self._maps.merge(other._maps)
        self._image_ids |= {name: i + first_image for name, i in other._image_ids.items()}
        self._image_pixels += other._image_pixels
        self._image_positives += other._image_positives
        self._owner_weight += other._owner_weight
        self._owner_image += [i + first_image for i in other._owner_image]
        self._top.raise_cut(other._top.cut)
        self._raise_cut()
        self._top.keep(self._top.at_or_above_cut(other._top.entries) + np.uint64(first_owner))

    def groups(self) -> Groups:
        """The ranking: exact groups from the top store, then bins below its cut."""
        return self._ranking()[0]

    def _ranking(self) -> tuple[Groups, Keys]:
        """The groups, and the lowest key of each."""
        self._settle()
        top, top_above = self._top.groups(np.array(self._owner_weight, np.int64))
        low, low_between = self._histogram.positive_bins_below(self._top.cut)
        pixels = np.concatenate([top.pixels, low.pixels])
        positives = np.concatenate([top.positives, low.positives])
        pixels_above = np.concatenate([top_above, low_between + len(self._top.entries)])
        positives_above = np.cumsum(positives) - positives
        tied = np.concatenate([np.ones(len(top.key), np.bool_), self._histogram.are_ties(low.key)])
        key = np.concatenate([top.key, low.key])
        groups = Groups(
            unit="pixels",
            num_negatives=self.normal_pixels,
            num_positives=self.defective_pixels,
            num_regions=self.num_regions,
            threshold=key_scores(key),
            above=pixels_above - positives_above,
            negatives=pixels - positives,
            positives=positives,
            weight=np.concatenate([top.weight, low.weight]),
            tied=tied,
        )
        return groups, key

    def result(self, fpr_limit: float = 0.3) -> dict[str, Metric]:
        """All pixel metrics: pixel_auroc, pixel_ap, pixel_f1max, pixel_ioumax, aupro; and, unless
        the state does without, dsc, dsc_defective, dsc_pooled."""
        groups, lowest = self._ranking()
        best = best_f1(groups)
        metrics = {
            "pixel_auroc": auroc(groups),
            "pixel_ap": average_precision(groups),
            "pixel_f1max": best.f1max,
            "pixel_ioumax": best.ioumax,
            "aupro": aupro(groups, fpr_limit),
        }
        if self.with_dsc:
            metrics |= dsc(groups, lowest, self._histogram.shift, self._maps)
        return metrics

    def f1max_threshold(self) -> float:
        """Highest score t for which `score >= t` reaches pixel_f1max; chosen on test labels."""
        return best_f1(self.groups()).threshold

    def curves(self, points: int = 200, fpr_limit: float = 0.3) -> dict[str, Floats]:
        """ROC, precision-recall and PRO curves for plotting; see `curves_of`."""
        return curves_of(self.groups(), points, fpr_limit)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one file; equal states give equal bytes."""
        target = Path(path)
        arrays = self._arrays()
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        settings = {
            "format": _FORMAT,
            "exact": self.exact,
            "exact_pixels": self.exact_pixels,
            "max_bins": self.max_bins,
            "with_dsc": self.with_dsc,
            "maps_lost": self._maps.lost,
            "shift": self._histogram.shift,
            "mixed": sorted(self._histogram.mixed),
            "cut": self._top.cut,
            "image_ids": sorted(self._image_ids),
        }
        # One entry, because safetensors writes several in no fixed order.
        save_file(arrays, partial, {"state": json.dumps(settings)})
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PixelState":
        """Read a state that `save` wrote.

        Raises:
            InputError: the file is no such state, or of another version.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:  # safetensors' own error derives from Exception only
            raise InputError(f"{path} is not a saved PixelState: {error}") from error
        settings = json.loads(metadata.get("state", "{}"))
        if settings.get("format") != _FORMAT:
            raise InputError(f"{path} is not a saved PixelState of this version ({_FORMAT})")
        state = cls(**{name: settings[name] for name in _SETTINGS})
        state._image_ids = {name: i for i, name in enumerate(settings["image_ids"])}
        state._image_pixels = arrays["image_pixels"].tolist()
        state._image_positives = arrays["image_positives"].tolist()
        state._owner_weight = arrays["owner_weight"].tolist()
        state._owner_image = arrays["owner_image"].tolist()
        state._maps.lost = settings["maps_lost"]
        start = 0
        if state.with_dsc and not state._maps.lost:
            for pixels, positives in zip(state._image_pixels, state._image_positives, strict=True):
                middle, end = start + pixels, start + pixels + positives
                state._maps.append(arrays["maps"][start:middle], arrays["maps"][middle:end])
                start = end
        state._top.cut = settings["cut"]
        state._top.keep(arrays["top"])
        bins = (arrays[f"bin_{name}"] for name in ("key", "pixels", "positives", "weight"))
        state._histogram.add_bins(Bins(*bins), settings["shift"])
        state._histogram.mixed = set(settings["mixed"])
        return state

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same images with the same scores, however they were gathered."""
        if not isinstance(other, PixelState):
            return NotImplemented
        ours, theirs = self._arrays(), other._arrays()
        return (
            all(getattr(self, name) == getattr(other, name) for name in _SETTINGS)
            and self._image_ids.keys() == other._image_ids.keys()
            and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        )

    __hash__ = None  # type: ignore[assignment]

    def _add_image(self, scores: NDArray[np.float32], mask: NDArray[np.bool_], name: str) -> None:
        """Add one map (H, W) that has passed all checks."""
        scores = scores.reshape(-1)
        where, region = region_labels(mask)
        sizes = np.bincount(region)[1:] if len(where) else np.zeros(0, np.int64)
        self._check_regions(len(sizes))
        first_owner, image = len(self._owner_image), self.num_images
        self._image_ids[name] = image
        self._image_pixels.append(len(scores))
        self._image_positives.append(len(where))
        # + size // 2 rounds 1 / size to nearest
        self._owner_weight += [0, *((WEIGHT_ONE + sizes // 2) // sizes).tolist()]
        self._owner_image += [image] * (1 + len(sizes))

        owner = None
        if len(where):
            owner = np.zeros(len(scores), np.int32)
            owner[where] = region
        for start in range(0, len(scores), _CHUNK):
            keys = score_keys(scores[start : start + _CHUNK])
            if not self.exact:
                self._histogram.add_pixels(keys)
            if self._top.cut == KEY_END:
                continue
            high = np.flatnonzero(keys >= self._top.cut)
            if len(high):
                of = None if owner is None else owner[start:][high]
                self._keep(make_entries(keys[high], of, first_owner))
        positives = scores[where]
        if len(where) and not self.exact:
            weights = np.array(self._owner_weight[first_owner:], np.int64)
            self._histogram.add_positives(score_keys(positives), weights[region])
        if self.with_dsc:
            self._maps.append(scores, positives)

    def _keep(self, entries: Entries) -> None:
        if not self._top.has_room(len(entries)):
            self._raise_cut()
            entries = self._top.at_or_above_cut(entries)
        self._top.keep(entries)

    def _raise_cut(self) -> None:
        """Raise the cut of the top store to what the histogram allows now.

        The last such cut, over all data, is at least as high as every earlier one: counts only grow
        and bins only widen. So what was dropped on the way would be dropped at the end as well.
        """
        if not self.exact:
            self._top.raise_cut(self._histogram.cut(self.exact_pixels))

    def _settle(self) -> None:
        """Bring the state to the form that depends on nothing but the data; sort the top store."""
        self._raise_cut()
        self._top.sort()

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The state in a form that only depends on the data: images by name, all else sorted."""
        self._settle()
        order = np.array([self._image_ids[name] for name in sorted(self._image_ids)], np.intp)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        owner_image = rank[np.array(self._owner_image, np.intp)]
        owners = np.argsort(owner_image, kind="stable")  # regions keep their order in an image
        renamed = np.empty(len(owners), np.uint64)
        renamed[owners] = np.arange(len(owners))
        bins = self._histogram.bins()
        kept = order.tolist() if self.with_dsc and not self._maps.lost else []
        maps = [scores.copy() for index in kept for scores in self._maps.image(index)]
        return {
            "maps": np.concatenate([np.zeros(0, np.float32), *maps]),
            "image_pixels": np.array(self._image_pixels, np.int64)[order],
            "image_positives": np.array(self._image_positives, np.int64)[order],
            "owner_image": owner_image[owners],
            "owner_weight": np.array(self._owner_weight, np.int64)[owners],
            "top": self._top.renamed(renamed),
            "bin_key": bins.key,
            "bin_pixels": bins.pixels,
            "bin_positives": bins.positives,
            "bin_weight": bins.weight,
        }

    def _refuse_known(self, image_ids: Sequence[str]) -> None:
        for name in image_ids:
            if name in self._image_ids:
                raise InputError(
                    f"image {name!r} was already added: add each image once, "
                    "and give image_ids to states that are merged"
                )

    def _check_regions(self, more: int) -> None:
        if self.num_regions + more > _MAX_REGIONS:
            raise InputError(
                f"more than {_MAX_REGIONS} defective regions in one state: split it by category"
            )


def _as_maps(maps: ArrayLike) -> NDArray[Any]:
    array = np.asarray(maps)
    if array.ndim not in (2, 3):
        raise InputError(f"maps and masks must be (B, H, W) or (H, W), got shape {array.shape}")
    return array if array.ndim == 3 else array[None]


def _as_float32(scores: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond float32 is infinity: the order stays
        return np.ascontiguousarray(scores, dtype=np.float32)


def region_labels(mask: NDArray[np.bool_]) -> tuple[Integers, NDArray[np.int32]]:
    """Flat positions of a mask's positives (K,), and their 8-connected regions from 1 (K,)."""
    where = np.flatnonzero(mask)
    if not len(where):
        return where, np.zeros(0, np.int32)
    width = mask.shape[1]
    rows = slice(int(where[0]) // width, int(where[-1]) // width + 1)
    occupied = np.flatnonzero(mask[rows].any(axis=0))
    columns = slice(int(occupied[0]), int(occupied[-1]) + 1)
    box = mask[rows, columns]  # labelling the bounding box alone is several times faster
    labels, _ = ndimage.label(box, _EIGHT_CONNECTED)
    return where, labels[box]
