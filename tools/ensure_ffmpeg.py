"""Find ffmpeg and ffprobe, with which FiftyOne reads videos, or install them if that needs no interaction."""

import shutil

from ensure_chromium import install

PROGRAMS = ("ffmpeg", "ffprobe")
MISSING = (
    "ffmpeg and ffprobe are not in PATH: videos can't be segmented, and their tests are skipped. Images need neither. "
    "`apt-get install ffmpeg`, or your system's way to install it, makes them work."
)


def main() -> None:
    if not all(map(shutil.which, PROGRAMS)):
        install("ffmpeg", "for videos")
    found = all(map(shutil.which, PROGRAMS))
    print(f"Videos are read by {shutil.which('ffmpeg')}" if found else MISSING)


if __name__ == "__main__":
    main()
