"""Finds ffmpeg and ffprobe, with which FiftyOne reads videos, or installs them if that needs no interaction."""

import shutil

from ensure_chromium import install

PROGRAMS = ("ffmpeg", "ffprobe")
MISSING = (
    "ffmpeg and ffprobe are not in PATH: videos can't be segmented, and their tests are skipped. Images need neither. "
    "Install them for videos, for example with `apt-get install ffmpeg`."
)


def main() -> None:
    if not all(map(shutil.which, PROGRAMS)):
        install("ffmpeg", "for videos")
    are_installed = all(map(shutil.which, PROGRAMS))
    print(f"Videos are read by {shutil.which('ffmpeg')}" if are_installed else MISSING)


if __name__ == "__main__":
    main()
