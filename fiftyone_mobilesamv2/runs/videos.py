"""Segments videos frame by frame. FiftyOne's own reader ends without an error where a video is damaged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import closing
from functools import lru_cache
from typing import IO, TYPE_CHECKING

import fiftyone.core.utils as fou
import numpy as np

from ..errors import FieldBusyError, MobileSAMv2Error, message_of
from ..fiftyone_internals import root_dataset, split_frame_field
from ..images import check_is_file
from ..labels.documents import Progress, ensure_metadata
from ..modeling.arrays import ImageArray
from ..zoo.model import MobileSAMv2Model
from ..zoo.reading import ImageItem
from .claims import check_claim
from .pipeline import counted
from .record import SegmentationRun
from .retry import UNAVAILABLE

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection


class VideoError(MobileSAMv2Error):
    """A video can't be read, or not to its end."""


def check_ffmpeg() -> None:
    """Raises MobileSAMv2Error unless ffmpeg and ffprobe, which read videos, are installed."""
    if missing := [program for program in ("ffmpeg", "ffprobe") if shutil.which(program) is None]:
        raise MobileSAMv2Error(
            f"Videos are read with ffmpeg and ffprobe, but {' and '.join(missing)} can't be found in PATH. Install "
            "them, for example with `apt-get install ffmpeg` or `brew install ffmpeg`."
        )


def segment_videos(
    videos: SampleCollection,
    model: MobileSAMv2Model,
    label_field: str,
    run: SegmentationRun,
    batch_size: int,
    progress: Progress,
) -> None:
    """Segments and stores the frames of videos, one video after the other.

    A video that fails becomes one failed image of the run; its frames before the failure are stored.

    Args:
        run: updated with images, objects, failures and seconds.
    """
    dataset, (field_name, _) = root_dataset(videos), split_frame_field(videos, label_field)
    ensure_metadata(videos, progress=False)
    counts = dict(zip(*videos.values(["id", "metadata.total_frame_count"])))
    total = sum(count or 0 for count in counts.values())
    with counted(run, model), model, fou.ProgressBar(total=total, progress=progress) as bar:
        for sample_id in counts:
            if sample_id not in dataset:  # it was deleted meanwhile
                continue
            video = dataset[sample_id]
            stored = 0
            try:
                with closing(read_frames(video.filepath, batch_size)) as batches:
                    for batch in batches:
                        _correct_size(video, batch[0])
                        labels = model.predict_all(batch)
                        check_claim(dataset, run)
                        for number, label in enumerate(labels, stored + 1):
                            video.frames[number][field_name] = label
                        video.save()
                        stored += len(batch)
                        run.objects = model.num_labels
                        bar.update(len(batch))
            except (*UNAVAILABLE, OSError, FieldBusyError):  # the following videos would fail, too
                raise
            except Exception as error:
                model.segment_all([ImageItem(sample_id, video.filepath, error=message_of(error))])


def _correct_size(video: fo.Sample, frame: ImageArray) -> None:
    """Swaps the sides in the metadata of a rotated video: FiftyOne misses rotations that FFmpeg 5 and later report."""
    metadata, (height, width) = video.metadata, frame.shape[:2]
    if metadata and height != width and (metadata.frame_width, metadata.frame_height) == (height, width):
        metadata.frame_height, metadata.frame_width = height, width


def read_frames(path: str, batch_size: int) -> Generator[list[ImageArray], None, None]:
    """Yields the frames of a video in batches, uint8 RGB [H, W, 3] each, rotated as players show them.

    Raises:
        VideoError: the video can't be read or is damaged; raised after the last frame that could be read.
    """
    try:
        check_is_file(path)
    except (OSError, ValueError) as error:
        raise VideoError(message_of(error)) from error
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", f"file:{path}", *_every_frame_once()]
    command += ["-f", "image2pipe", "-codec:v", "ppm", "-pix_fmt", "rgb24", "-"]
    count, batch = 0, []
    with tempfile.TemporaryFile() as messages, subprocess.Popen(command, stdout=-1, stderr=messages) as ffmpeg:
        assert ffmpeg.stdout is not None
        try:
            while (frame := _read_ppm(ffmpeg.stdout)) is not None:
                count += 1
                batch.append(frame)
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
        except GeneratorExit:
            ffmpeg.kill()
            raise
        status = ffmpeg.wait()
        messages.seek(0)
        text = messages.read(10_000).decode(errors="replace")
    if text or status or not count:
        problem = f"is damaged; {count} of its frames could be read" if count else "is damaged or not a video"
        raise VideoError(f"{path!r} {problem}: {_cause(text, path) or f'ffmpeg ended with status {status}'}")


@lru_cache
def _every_frame_once() -> list[str]:
    """The option that neither repeats nor drops frames; FFmpeg 5.1 renamed it, and later versions lack the old name."""
    help_text = subprocess.run(["ffmpeg", "-hide_banner", "-h", "long"], capture_output=True, text=True).stdout
    return ["-fps_mode", "passthrough"] if "-fps_mode" in help_text else ["-vsync", "0"]


def _read_ppm(stream: IO[bytes]) -> ImageArray | None:
    """The next image in PPM format; None if the stream ends before or in it."""
    magic, size, _ = (stream.readline() for _ in range(3))
    if magic != b"P6\n":
        return None
    width, height = map(int, size.split())
    pixels = stream.read(height * width * 3)
    if len(pixels) < height * width * 3:
        return None
    return np.frombuffer(bytearray(pixels), np.uint8).reshape(height, width, 3)


def _cause(messages: str, path: str) -> str:
    """The first of ffmpeg's messages, without the path and the decoder's address."""
    first = next(filter(None, messages.splitlines()), "")
    first = re.sub(r"^\[([^]]*) @ 0x[0-9a-f]+\] ", r"\1: ", first)
    return first.replace(f"file:{path}: ", "").replace(os.fspath(path), "")[:200]
