"""The command line: `fiftyone-mobilesamv2 ...`, or `python -m fiftyone_mobilesamv2.cli ...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 1 after an error that the message explains, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="fiftyone-mobilesamv2", description="MobileSAMv2 for FiftyOne")
    commands = parser.add_subparsers(dest="command", required=True)

    quickstart = commands.add_parser("quickstart", help="segment a folder of images, or synthetic scenes")
    quickstart.add_argument("--images", type=Path, help="folder of images; without it scenes are made")
    quickstart.add_argument("--model", default="mobilesamv2-demo-torch", help="name of a zoo model")
    quickstart.add_argument("--scenes", type=positive, default=60, help="how many scenes to make")
    quickstart.add_argument("--batch-size", type=positive, default=8)
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for scenes and overlays.png"
    )

    commands.add_parser("install", help="register the zoo models and the plugin with FiftyOne")
    commands.add_parser("uninstall", help="undo install")

    args = parser.parse_args(argv)
    expected = [ValueError, OSError]
    try:
        if args.command == "quickstart":
            from . import quickstart  # here: the rest need not wait for torch
            from .modeling.checkpoints import CheckpointError

            expected.append(CheckpointError)
            quickstart.run(args.images, args.model, args.scenes, args.batch_size, args.output)
        else:
            from . import registration

            links = registration.install() if args.command == "install" else registration.uninstall()
            verb = "Linked" if args.command == "install" else "Removed"
            print("\n".join(f"{verb} {link}" for link in links) or "Nothing was installed.")
    except tuple(expected) as error:
        print(f"fiftyone-mobilesamv2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfiftyone-mobilesamv2: interrupted", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
