"""The command line: `fiftyone-mobilesamv2 ...`, or `python -m fiftyone_mobilesamv2.cli ...`."""

from __future__ import annotations

import sys

from ..errors import MobileSAMv2Error, message_of
from .commands import (
    run_delete_masks,
    run_evaluate,
    run_models,
    run_repair,
    run_reproduce,
    run_segment,
    run_train,
)
from .parser import make_parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 1 after an error, which the message explains, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(argv[0] if argv else None)
    args = parser.parse_args(argv)
    try:
        if args.command == "quickstart":
            from ..quickstart import run as run_quickstart  # here, so that other commands need not wait for torch

            run_quickstart(args.images, args.model, args.scenes, args.batch_size, args.output)
        elif args.command == "segment":
            return run_segment(args)
        elif args.command == "train":
            return run_train(args)
        elif args.command == "models":
            return run_models(args)
        elif args.command == "delete-masks":
            run_delete_masks(args)
        elif args.command == "repair":
            return run_repair(args)
        elif args.command == "doctor":
            from ..doctor import run as run_doctor

            return run_doctor(args.model, args.device, args.dtype, args.output)
        elif args.command == "reproduce":
            run_reproduce(args)
        elif args.command == "evaluate":
            run_evaluate(args)
        else:
            from .. import registration

            links = registration.install() if args.command == "install" else registration.uninstall()
            verb = "Linked" if args.command == "install" else "Removed"
            print("\n".join(f"{verb} {link}" for link in links) or "Nothing was installed.")
    except Exception as error:
        from pymongo.errors import PyMongoError  # here, so that the help need not wait for it

        # Anything else is a bug: its traceback shows where.
        if not isinstance(error, (MobileSAMv2Error, OSError, PyMongoError)):
            raise
        print(f"fiftyone-mobilesamv2: {message_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfiftyone-mobilesamv2: interrupted", file=sys.stderr)
        return 130
    return 0
