"""Labelled images -> network inputs with random prompts and the masks that they should give.

An item is determined by the seed, the epoch and the example's index alone, whichever thread makes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from torch import Tensor

from ..errors import LabelError, message_of
from ..modeling.arrays import AnyArray, FloatArray, ImageArray, MaskArray
from ..modeling.image_encoders import EncoderConfig, preprocess
from ..modeling.prompt_guided_decoder import MULTIMASK, SINGLE_MASK
from ..modeling.rle import RLE
from .examples import Example

# A detector's boxes are slightly off. SAM trains with noise of a tenth of the side, at most 20 px of the network input
# (section A); detectors err by about half of that.
_BOX_NOISE = 0.05
_MAX_BOX_NOISE = 20
# Half of the images are seen whole, as in inference; the others at a scale between these.
_SHARE_RESCALED = 0.5
_SCALES = 0.7, 2.0

# An object counts where a view shows this share of its box, with sides of this many pixels of the network input.
_MIN_SHOWN, _MIN_SIDE = 0.25, 4

Key = TypeVar("Key")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompts:
    """N prompts of one kind: boxes, or the same number P of points each.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels of the network input, or None.
        points: float32 [N, P, 2], xy, or None.
        point_labels: int32 [N, P], 1 inside the object and 0 outside, or None.
        targets: float32 [N, L, L]: the share of each cell of the low-res logits that the object covers.
    """

    boxes: Tensor | None
    points: Tensor | None
    point_labels: Tensor | None
    targets: Tensor

    @property
    def masks(self) -> slice:
        """The decoder's masks that such a prompt uses: a single point is ambiguous."""
        return MULTIMASK if self.points is not None and self.points.shape[1] == 1 else SINGLE_MASK

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on `device`."""
        boxes, points, labels = (
            None if t is None else t.to(device) for t in (self.boxes, self.points, self.point_labels)
        )
        return Prompts(boxes, points, labels, self.targets.to(device))


@dataclass(frozen=True)
class PromptedImage:
    """A network input, and what is in it.

    Attributes:
        pixels: float32 [3, S, S].
        prompts: by kind; none if no object with a mask is large enough to be seen.
        boxes, ignored: float32 [N, 4] and [M, 4], xyxy in pixels of the network input: the objects, and the regions
            that count neither as an object nor as background.
    """

    pixels: Tensor
    prompts: tuple[Prompts, ...]
    boxes: Tensor
    ignored: Tensor


@dataclass(frozen=True)
class UnreadableImage:
    """An image that can't be trained on, and why."""

    name: str
    cause: str


@dataclass(frozen=True)
class View:
    """A part of an image, maybe mirrored, at the top left of the network input.

    Attributes:
        x, y, width, height: the part, in pixels of the image.
        mirrored: whether left and right are exchanged.
        side: pixels of the network input that the part's long side takes.
    """

    x: int
    y: int
    width: int
    height: int
    mirrored: bool
    side: int

    def crop(self, array: AnyArray) -> AnyArray:
        """The view's part of an array [H, W, ...], at the same scale."""
        part = array[self.y : self.y + self.height, self.x : self.x + self.width]
        return part[:, ::-1] if self.mirrored else part


def random_view(rng: np.random.Generator, size: tuple[int, int], center: FloatArray, image_size: int) -> View:
    """A random part of an image that contains a point.

    Args:
        size: (height, width) of the image.
        center: x, y of the point, in pixels.
        image_size: side of the network input.
    """
    height, width = size
    scale = float(np.exp(rng.uniform(*np.log(_SCALES)))) if rng.random() < _SHARE_RESCALED else 1.0
    mirrored = bool(rng.random() < 0.5)
    if scale <= 1:
        return View(0, 0, width, height, mirrored, max(1, round(scale * image_size)))
    part = max(1, round(width / scale)), max(1, round(height / scale))
    x, y = (
        int(rng.integers(max(0, int(c) - p + 1), min(n - p, int(c)) + 1))
        for c, p, n in zip(np.clip(center, 0, (width - 1, height - 1)), part, (width, height))
    )
    return View(x, y, *part, mirrored, image_size)


@dataclass(frozen=True)
class VisibleObject:
    """An object as a view shows it.

    Attributes:
        mask: bool [h, w], cropped to its tight box, in pixels of the view's part.
        corner: x, y of the crop, in those pixels.
        scale: pixels of the network input per pixel of the part, in x and y.
        target: float32 [L, L]: the share of each cell of the low-res logits that it covers.
    """

    mask: MaskArray
    corner: FloatArray
    scale: FloatArray
    target: FloatArray

    @property
    def box(self) -> FloatArray:
        """x0, y0, x1, y1 in pixels of the network input, ends exclusive."""
        box: FloatArray = np.concatenate([self.corner, self.corner + self.mask.shape[::-1]]) * np.tile(self.scale, 2)
        return box

    def points(self, rng: np.random.Generator, inside: bool, count: int) -> FloatArray:
        """Random pixels' centres [count, 2], xy in pixels of the network input.

        Args:
            inside: whether they lie on the object, or else beside it: within its box and a quarter of its side around.
        """
        margin = 0 if inside else 1 + max(self.mask.shape) // 4
        y, x = np.nonzero(np.pad(self.mask, margin) == inside)
        chosen = rng.integers(0, len(x), count)
        points: FloatArray = (np.stack([x[chosen], y[chosen]], 1) - margin + 0.5 + self.corner) * self.scale
        return points


def visible_object(rle: RLE, view: View, input_size: tuple[int, int], cell: float, cells: int) -> VisibleObject | None:
    """What a view shows of an object; None if it fills no cell of the low-res logits by at least half.

    Such a cell is the smallest mask that can come out.

    Args:
        input_size: (height, width) of the view in the network input.
        cell, cells: side of a cell in pixels of the network input, and their number a side.
    """
    mask = view.crop(mask_utils.decode(rle).view(bool))
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    y, x = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    mask = mask[y, x]
    scale = np.array([input_size[1] / view.width, input_size[0] / view.height])
    down, across = _coverage(y, scale[1] / cell, cells), _coverage(x, scale[0] / cell, cells)
    target = down @ mask.astype(np.float32) @ across.T
    if target.max() < 0.5:
        return None
    return VisibleObject(mask, np.array([x.start, y.start], float), scale, target)


def seen_boxes(example: Example, view: View, input_size: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """The boxes of the objects that a view shows, and the regions in it that are ignored.

    An object that is hardly visible, or too small in the view, becomes an ignored region. The box of an object that the
    view cuts off encloses what is visible of its mask; without a mask, it is the visible part of the object's box.

    Args:
        input_size: (height, width) of the view in the network input.

    Returns:
        float32 [N, 4] and [M, 4], xyxy in pixels of the network input.
    """
    corner, end = np.array([view.x, view.y] * 2), np.array([view.width, view.height] * 2)
    whole = np.concatenate([example.boxes, example.ignored]) - corner
    shown = np.clip(whole, 0, end)
    is_object = np.arange(len(whole)) < len(example.boxes)
    has_masks = example.masks is not None and len(example.masks) == len(example.boxes)
    areas, shown_areas = ((each[:, 2:] - each[:, :2]).clip(0).prod(1) for each in (whole, shown))
    is_object &= shown_areas >= _MIN_SHOWN * areas
    for i in np.flatnonzero(is_object & (whole != shown).any(1) & has_masks):
        mask = mask_utils.decode((example.masks or ())[i])
        part = mask[view.y : view.y + view.height, view.x : view.x + view.width]
        rows, columns = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
        shown[i] = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else 0
    if view.mirrored:
        shown[:, [0, 2]] = view.width - shown[:, [2, 0]]
    shown = shown * np.array([input_size[1] / view.width, input_size[0] / view.height] * 2)
    sides = shown[:, 2:] - shown[:, :2]
    is_object &= (sides >= _MIN_SIDE).all(1)
    objects, ignored = shown[is_object], shown[~is_object & (sides > 0).all(1)]
    return objects.astype(np.float32), ignored.astype(np.float32)


def _coverage(pixels: slice, scale: float, cells: int) -> FloatArray:
    """float32 [cells, pixels]: the share of each cell that each pixel, `scale` cells long, covers on an axis."""
    edges = np.arange(pixels.start, pixels.stop + 1) * scale
    start = np.arange(cells)[:, None]
    overlap: FloatArray = np.minimum(edges[1:], start + 1) - np.maximum(edges[:-1], start)
    return np.clip(overlap, 0, 1).astype(np.float32)


class PromptedImages:
    """The items to train on.

    Args:
        examples: images with masks.
        config: of the encoder.
        prompts_per_image: half of them are boxes, an eighth three points of which one is outside, the rest one point.
        seed: of all that is random.
    """

    def __init__(self, examples: Sequence[Example], config: EncoderConfig, prompts_per_image: int, seed: int) -> None:
        self.examples, self.prompts_per_image, self.seed = examples, prompts_per_image, seed
        self.image_size = config.image_size
        self.cells = 4 * config.embed_size

    def item(self, epoch: int, index: int) -> PromptedImage | UnreadableImage:
        """Example `index` as it is seen in an epoch, from 0."""
        example = self.examples[index]
        try:
            image, masks = example.read(), example.masks or ()
            for i, mask in enumerate(masks):
                if tuple(mask["size"]) != image.shape[:2]:
                    (rows, columns), (height, width) = mask["size"], image.shape[:2]
                    raise LabelError(
                        f"the mask of object {i} is of an image of {columns}x{rows} pixels, but this one has "
                        f"{width}x{height}"
                    )
        except Exception as error:  # of a file or a label: whatever it is, the other images can be trained on
            return UnreadableImage(example.name, message_of(error))
        return self._prompted(image, example, np.random.default_rng((self.seed, epoch, index)))

    def _prompted(self, image: ImageArray, example: Example, rng: np.random.Generator) -> PromptedImage:
        masks = example.masks or ()
        boxes = mask_utils.toBbox(list(masks)).reshape(-1, 4)  # x, y, width, height
        order = rng.permutation(np.flatnonzero(boxes[:, 2:].all(1)))
        center = boxes[order[0], :2] + boxes[order[0], 2:] / 2 if len(order) else np.zeros(2)
        view = random_view(rng, image.shape[:2], center, self.image_size)
        pixels, input_size = preprocess(np.ascontiguousarray(view.crop(image)), view.side)
        _change_colors(rng, pixels[:, : input_size[0], : input_size[1]].numpy())
        pixels = F.pad(pixels, (0, self.image_size - view.side, 0, self.image_size - view.side))

        ends = boxes[order, :2] + boxes[order, 2:]
        shown = (ends > (view.x, view.y)) & (boxes[order, :2] < (view.x + view.width, view.y + view.height))
        objects = []
        for i in order[shown.all(1)][: 2 * self.prompts_per_image]:  # bounds the time where hardly any can be seen
            seen = visible_object(masks[i], view, input_size, self.image_size / self.cells, self.cells)
            objects += [seen] if seen is not None else []
            if len(objects) == self.prompts_per_image:
                break
        prompts = tuple(self._prompts(rng, objects)) if objects else ()
        return PromptedImage(
            pixels, prompts, *(torch.from_numpy(each) for each in seen_boxes(example, view, input_size))
        )

    def _prompts(self, rng: np.random.Generator, objects: Sequence[VisibleObject]) -> Iterator[Prompts]:
        """Prompts of each kind; with fewer objects than prompts, an object has several."""
        order = np.resize(np.arange(len(objects)), self.prompts_per_image)
        several = self.prompts_per_image // 8
        kinds = np.split(rng.permutation(order), [several, self.prompts_per_image // 2])
        for kind, members in zip(("several", "point", "box"), kinds):
            if not len(members):
                continue
            chosen = [objects[i] for i in members]
            targets = torch.from_numpy(np.stack([each.target for each in chosen]))
            if kind == "box":
                boxes = np.stack([each.box for each in chosen])
                noise = rng.normal(0, _BOX_NOISE, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
                boxes += np.clip(noise, -_MAX_BOX_NOISE, _MAX_BOX_NOISE)
                yield Prompts(torch.from_numpy(boxes).float(), None, None, targets)
                continue
            labels = [1, 1, 0] if kind == "several" else [1]
            points = [
                np.concatenate([each.points(rng, True, labels.count(1)), each.points(rng, False, labels.count(0))])
                for each in chosen
            ]
            point_labels = torch.tensor([labels] * len(chosen), dtype=torch.int32)
            yield Prompts(None, torch.from_numpy(np.stack(points)).float(), point_labels, targets)


def _change_colors(rng: np.random.Generator, pixels: FloatArray) -> None:
    """Changes saturation, contrast and brightness of normalised pixels [3, h, w] in place."""
    # NumPy's means, unlike torch's, don't depend on the number of threads.
    saturation, contrast = (np.float32(rng.uniform(0.8, 1.2)) for _ in range(2))
    grey = pixels.mean(0)
    mean = grey.mean()
    pixels -= grey
    pixels *= saturation
    pixels += grey
    pixels -= mean
    pixels *= contrast
    pixels += mean + np.float32(rng.uniform(-0.3, 0.3))


def prefetched(keys: Iterable[Key], load: Callable[[Key], Item], workers: int, ahead: int) -> Iterator[Item]:
    """Yields `load(key)` of each key, in order, loaded by threads while earlier ones are used.

    Threads rather than processes: most of an item's time is spent in libraries that release the interpreter's lock, and
    an example's `read` need not be picklable.

    Args:
        workers: threads; 0 loads each item when it is asked for.
        ahead: how many items may be ready or in the making.
    """
    if workers == 0:
        yield from map(load, keys)
        return
    pool = ThreadPoolExecutor(workers, "training-images")
    waiting: deque[Future[Item]] = deque()
    try:
        for key in keys:
            waiting.append(pool.submit(load, key))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
