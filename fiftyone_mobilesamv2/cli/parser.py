"""The options of each command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.ranking import RANKINGS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of the command line; `command` is the one that is given, whose options may take time to declare."""
    parser = argparse.ArgumentParser(prog="fiftyone-mobilesamv2", description="MobileSAMv2 for FiftyOne")
    commands = parser.add_subparsers(dest="command", required=True)

    quickstart = commands.add_parser("quickstart", help="segment a folder of images, or photos and synthetic scenes")
    quickstart.add_argument(
        "--images",
        type=Path,
        help="folder of images; if omitted, photos of installed packages, and scenes that are made",
    )
    quickstart.add_argument(
        "--model", help="name of a model, or folder of a trained one; if omitted, the one that the package includes"
    )
    quickstart.add_argument("--scenes", type=positive, default=40, help="how many scenes to make")
    quickstart.add_argument("--batch-size", type=positive, default=8)
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for scenes and overlays.png"
    )

    segment = commands.add_parser("segment", help="segment every object of a dataset's images; run again to continue")
    segment.add_argument("dataset", help="name of a FiftyOne dataset")
    segment.add_argument("--model", required=True, help="name of a model, or folder of a trained one")
    segment.add_argument("--label-field", default="segmentations", help="field for the masks")
    segment.add_argument("--replace", action="store_true", help="replace existing labels; otherwise they are kept")
    segment.add_argument("--batch-size", type=positive, default=8)
    if command == "segment":
        add_parameters(segment)
    add_cluster(segment)

    reproduce = commands.add_parser("reproduce", help="measure the paper's tables on COCO or LVIS ground truth")
    reproduce.add_argument("--annotations", type=Path, required=True, help="JSON file in COCO or LVIS format")
    reproduce.add_argument("--images", type=Path, required=True, help="folder of the images listed in it")
    reproduce.add_argument("--model", required=True, help="name of a model; the paper uses mobilesamv2-vith-torch")
    reproduce.add_argument("--prompting", choices=("object_aware", "grid", "both"), default="both")
    reproduce.add_argument(
        "--grids", type=positive, nargs="+", default=[16, 32, 64], help="points per side of each grid"
    )
    reproduce.add_argument(
        "--no-grid-filters",
        action="store_true",
        help="keep all masks of the grid, whatever their predicted IoU and stability",
    )
    reproduce.add_argument("--confidence", type=float, default=0.4, help="minimum score of a prompt")
    reproduce.add_argument("--sample", type=positive, default=100, help="maximum number of images, drawn at random")
    reproduce.add_argument("--seed", type=int, default=0, help="seed of the random draw")
    reproduce.add_argument("--batch-size", type=positive, default=4)
    reproduce.add_argument("--device", help="cuda, mps or cpu; the best available if omitted")
    reproduce.add_argument(
        "--output", type=Path, default=Path("reproduction"), help="folder for reproduction.json and reproduction.png"
    )

    evaluate = commands.add_parser("evaluate", help="measure the AR@K of a dataset's proposals")
    evaluate.add_argument("dataset", help="name of a FiftyOne dataset")
    evaluate.add_argument("pred_field", help="field of the proposals: detections or polylines")
    evaluate.add_argument("--gt-field", default="ground_truth", help="field of the objects")
    evaluate.add_argument("--eval-key", default="ar", help="key of the evaluation; an existing one is replaced")
    evaluate.add_argument(
        "--ks", type=positive, nargs="+", default=[10, 100, 1000], help="numbers of proposals per image"
    )
    evaluate.add_argument("--boxes", action="store_true", help="compare boxes instead of masks")
    evaluate.add_argument("--rank-by", choices=tuple(RANKINGS), default="confidence")
    evaluate.add_argument(
        "--compare", nargs="+", default=[], metavar="KEY", help="earlier evaluations to print beside it"
    )

    add_cluster(evaluate)
    add_train(commands)

    models = commands.add_parser("models", help="list the models, download, verify or delete their files")
    action = models.add_mutually_exclusive_group()
    for verb, what in (
        ("download", "its missing files, and verify them"),
        ("verify", "every byte of its downloaded files"),
        ("delete", "its files that no other model needs; of a trained model, all (with --yes)"),
    ):
        action.add_argument(f"--{verb}", metavar="MODEL", help=f"{verb} {what}")
    action.add_argument("--add", metavar="FOLDER", help="make the trained model in a folder known by its name")
    action.add_argument("--remove", metavar="MODEL", help="undo --add; the folder is kept")
    action.add_argument(
        "--check-sources",
        action="store_true",
        help="ask every host whether it has the declared file, without downloading",
    )
    models.add_argument("--yes", action="store_true", help="delete a trained model; otherwise only say what it has")
    models.add_argument("--details", action="store_true", help="if a download fails, print all sources and reasons")

    delete = commands.add_parser("delete-masks", help="delete the masks that runs stored in a field, with their files")
    delete.add_argument("dataset", help="name of a FiftyOne dataset")
    delete.add_argument("label_field", help="field of the masks")
    delete.add_argument("--yes", action="store_true", help="delete them; otherwise only say what would be deleted")

    repair = commands.add_parser("repair", help="declare fields that FiftyOne lost, and find masks that were moved")
    repair.add_argument("dataset", help="name of a FiftyOne dataset")
    repair.add_argument("--mask-dir", type=Path, help="where the folder of mask files was moved to")

    doctor = commands.add_parser("doctor", help="check that a model works on this machine")
    doctor.add_argument("model", nargs="?", help="name or folder of a model; if omitted, the one in the package")
    doctor.add_argument("--device", help="cuda, mps or cpu; the best available if omitted")
    doctor.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    doctor.add_argument("--output", type=Path, default=Path("doctor.png"), help="picture of the result")

    commands.add_parser("install", help="register the zoo models and the plugin with FiftyOne")
    commands.add_parser("uninstall", help="undo install")
    return parser


def add_train(commands: Commands) -> None:
    """Adds the command that trains a model."""
    train = commands.add_parser(
        "train", help="train a model on a dataset's labels, and measure it before and after; run again to continue"
    )
    train.add_argument("dataset", help="name of a FiftyOne dataset")
    train.add_argument("--label-field", default="ground_truth", help="field of the labels: detections or polylines")
    train.add_argument("--name", required=True, help="name of the new model")
    train.add_argument("--part", choices=("discovery", "masks"), default="discovery", help="what to train")
    train.add_argument(
        "--base",
        default="mobilesamv2-tinyvit-torch",
        metavar="MODEL",
        help="name of the model to start from, or folder of a trained one",
    )
    validation = train.add_mutually_exclusive_group()
    validation.add_argument(
        "--validation", type=float, default=0.2, metavar="SHARE", help="share of the images to measure with"
    )
    validation.add_argument("--validation-tag", nargs="+", metavar="TAG", help="measure with the samples that have one")
    train.add_argument("--epochs", type=positive, help="default: what suits the number of images")
    train.add_argument("--batch-size", type=positive)
    train.add_argument("--learning-rate", type=float, help="its highest")
    train.add_argument(
        "--unlabeled",
        choices=("ignore", "background"),
        default="ignore",
        help="what the base finds without a label: leave it out, or learn that it is no object (discovery only)",
    )
    train.add_argument(
        "--discovery",
        choices=("detector", "embedding"),
        help="find objects with a network of its own or in the image embedding; default: as the base (discovery only)",
    )
    train.add_argument(
        "--size",
        choices=("n", "s", "m", "l", "x"),
        help="start from an untrained YOLOv8 of this size instead of the base's detector (discovery only)",
    )
    train.add_argument(
        "--teacher", metavar="MODEL", help="what it finds are the labels of images without any (discovery only)"
    )
    train.add_argument(
        "--learn",
        choices=("decoder", "neck", "encoder"),
        help="the decoder, or also the encoder's neck, or all (masks only)",
    )
    train.add_argument("--seed", type=int, default=0, help="of the order of images and the augmentations")
    train.add_argument("--device", help="cuda, mps or cpu; the best available if omitted")
    train.add_argument("--output", type=Path, help="the model's folder; default: below FiftyOne's model_zoo_dir")
    train.add_argument(
        "--keep-worse", action="store_true", help="keep the model even if it is not better than its base"
    )


def add_parameters(command: argparse.ArgumentParser) -> None:
    """Adds the options for a model's parameters, as declared."""
    from ..zoo.config import PARAMETERS  # here, so that the help of other commands need not wait for pydantic

    for parameter in PARAMETERS.values():
        if parameter.name in ("name", "raise_failures"):  # the name is --model; a run lists its failures
            continue
        only = f" ({parameter.applies_to} only)" if parameter.applies_to else ""
        flag = f"--{parameter.name.removesuffix('_thresh').replace('_', '-')}"
        options: dict[str, Any] = {"help": f"{parameter.title}: {parameter.description}{only}"}
        if parameter.kind is bool:
            options["action"] = "store_true"
        elif parameter.choices:
            options["choices"] = list(parameter.choices)
        elif parameter.kind is int and parameter.min == 1:
            options["type"] = positive
        else:
            options["type"] = parameter.kind
        command.add_argument(flag, dest=parameter.name, default=parameter.default, **options)


def add_cluster(command: argparse.ArgumentParser) -> None:
    """Adds the options for a Ray cluster."""
    command.add_argument(
        "--cluster",
        help="distribute the work over a Ray cluster: auto, its address, or local for processes on this machine",
    )
    command.add_argument("--workers", type=positive, help="number of workers; default: one per GPU, or per machine")


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
