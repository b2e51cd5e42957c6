"""The command line: `fiftyone-mobilesamv2 ...`, or `python -m fiftyone_mobilesamv2.cli ...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, DownloadError, MobileSAMv2Error, message_of
from .evaluation.ranking import RANKINGS

if TYPE_CHECKING:
    import fiftyone as fo


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 1 after an error, which the message explains, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fiftyone-mobilesamv2", description="MobileSAMv2 for FiftyOne")
    commands = parser.add_subparsers(dest="command", required=True)

    quickstart = commands.add_parser("quickstart", help="segment a folder of images, or synthetic scenes")
    quickstart.add_argument("--images", type=Path, help="folder of images; if omitted, scenes are made")
    quickstart.add_argument(
        "--model", default="mobilesamv2-demo-torch", help="name of a model, or folder of a trained one"
    )
    quickstart.add_argument("--scenes", type=positive, default=60, help="how many scenes to make")
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
    if argv[:1] == ["segment"]:
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

    args = parser.parse_args(argv)
    try:
        if args.command == "quickstart":
            from .quickstart import run as run_quickstart  # here, so that other commands need not wait for torch

            run_quickstart(args.images, args.model, args.scenes, args.batch_size, args.output)
        elif args.command == "segment":
            return run_segment(args)
        elif args.command == "models":
            return run_models(args)
        elif args.command == "delete-masks":
            run_delete_masks(args)
        elif args.command == "repair":
            return run_repair(args)
        elif args.command == "doctor":
            from .doctor import run as run_doctor

            return run_doctor(args.model, args.device, args.dtype, args.output)
        elif args.command == "reproduce":
            run_reproduce(args)
        elif args.command == "evaluate":
            run_evaluate(args)
        else:
            from . import registration

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


def run_segment(args: argparse.Namespace) -> int:
    """Segments a dataset. Returns 1 if images failed; they are listed on stderr."""

    from .runs.segment import segment_everything
    from .zoo.config import PARAMETERS, MobileSAMv2ModelConfig

    parameters = {name: value for name, value in vars(args).items() if name in PARAMETERS}
    run = segment_everything(
        load_dataset(args.dataset),
        MobileSAMv2ModelConfig({"name": args.model, **parameters}),
        args.label_field,
        replace=args.replace,
        batch_size=args.batch_size,
        progress=True,
        cluster=args.cluster,
        workers=args.workers,
    )
    print(
        f"{run.objects:,} objects in {run.images - run.num_failures:,} of {run.images:,} images, in "
        f"'{run.label_field}'; {run.images_per_second:.2g} images/s"
    )
    for failure in run.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if run.num_failures:
        print(f"Failed: {run.num_failures:,} of {run.images:,}. Run the command again to retry them.", file=sys.stderr)
    return 1 if run.num_failures else 0


def run_models(args: argparse.Namespace) -> int:
    """Lists models, or works on the files of one. Returns 1 if a file or source is wrong."""
    from tqdm import tqdm

    from .modeling.checkpoints import files, overview, trained
    from .modeling.checkpoints.lookup import all_files, find_trained
    from .modeling.checkpoints.sources import check_sources

    if args.download:
        try:
            for path in dict.fromkeys(files.fetch_model(args.download).values()):
                print(path)
        except DownloadError as error:
            if args.details:
                print(error.details, file=sys.stderr)
            raise
    elif args.verify:
        results = files.verify_model(args.verify, lambda _, weights: print(f"Reading {weights.filename} ..."))
        for weights, verified in results.items():
            print(f"{weights.filename}: {verified.problem or f'correct, sha256 {verified.sha256}'}")
        return int(any(verified.problem for verified in results.values()))
    elif args.add:
        added = trained.register(args.add)
        print(f"{added.name}: {added.folder.resolve()}")
    elif args.remove:
        print(f"{args.remove} is no longer known; {trained.unregister(args.remove)} is kept.")
    elif args.delete and (model := find_trained(args.delete)):
        folder = model.folder.resolve()
        if not args.yes:
            print(f"Would delete {model.name} with its folder, {folder}. Repeat the command with --yes to delete it.")
        elif kept := trained.delete_trained(model).kept:
            print(f"Deleted {model.name}. {folder} stays, with files that are not the model's: {', '.join(kept)}.")
        else:
            print(f"Deleted {model.name} with its folder, {folder}.")
    elif args.delete:
        for weights, why in files.kept_files(args.delete).items():
            if files.is_local(weights):
                print(f"{weights.filename} stays: {why}.")
        deleted = files.delete_model(args.delete)
        print(f"Deleted {overview.names(deleted)}." if deleted else f"No file of {args.delete} can be deleted.")
    elif args.check_sources:
        checks = []
        for check in tqdm(check_sources(all_files()), "Checking", sum(len(weights.sources) for weights in all_files())):
            checks.append(check)
        print(table(list(map(overview.source_row, checks))))
        return int(any(check.verdict != "right" for check in checks))
    else:
        for rows in (overview.model_rows(), overview.file_rows()):
            print(f"{table(rows)}\n")
        print(f"Downloaded weights are in {files.weights_dir()}.")
    return 0


def table(rows: list[dict[str, str]]) -> str:
    """Rows as a text table with a header."""
    from tabulate import tabulate

    return tabulate(rows, headers="keys", disable_numparse=True)


def run_reproduce(args: argparse.Namespace) -> None:
    """Reproduces the paper's tables, and prints the measured figures beside the paper's."""
    from . import zoo
    from .evaluation import reproduction

    print(f"Loading {args.model} ...")
    thresholds = {"pred_iou_thresh": 0, "stability_score_thresh": 0} if args.no_grid_filters else {}
    model = zoo.load_model(args.model, device=args.device, **thresholds)
    result = reproduction.reproduce(
        args.annotations,
        args.images,
        model,
        args.output,
        object_aware=args.prompting != "grid",
        grids=() if args.prompting == "object_aware" else args.grids,
        confidence=args.confidence,
        sample=args.sample,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    print(f"\n{result}\n")
    print(f"{args.output / reproduction.RESULTS_NAME}, {args.output / reproduction.PICTURE_NAME}")
    print(f"In the App: fiftyone app launch {result.about['dataset']}")


def run_evaluate(args: argparse.Namespace) -> None:
    """Evaluates a dataset and prints its AR@K, beside those of earlier evaluations if requested."""
    from .evaluation.proposal_results import ProposalResults, comparison_table
    from .evaluation.proposals import evaluate_proposals

    dataset = load_dataset(args.dataset)
    others = {}
    for key in args.compare:
        if key not in dataset.list_evaluations():
            raise ArgumentError(f"{args.dataset} has no evaluation '{key}'.")
        others[key] = dataset.load_evaluation_results(key)
        if others[key] is None:
            raise ArgumentError(f"Evaluation '{key}' of {args.dataset} has no results: it was interrupted.")
        if not isinstance(others[key], ProposalResults):
            raise ArgumentError(f"Evaluation '{key}' of {args.dataset} is not an evaluation of proposals.")
    results = evaluate_proposals(
        dataset,
        args.pred_field,
        args.gt_field,
        args.eval_key,
        ks=args.ks,
        use_masks=not args.boxes,
        rank_by=args.rank_by,
        cluster=args.cluster,
        workers=args.workers,
    )
    print(results.report())
    if others:
        print(f"\n{comparison_table(others | {args.eval_key: results}).to_string(float_format='{:.3f}'.format)}")


def run_delete_masks(args: argparse.Namespace) -> None:
    """Says what would be deleted, and deletes it with --yes."""
    from .runs.deletion import delete_masks, made_masks

    dataset = load_dataset(args.dataset)
    made = delete_masks(dataset, args.label_field) if args.yes else made_masks(dataset, args.label_field)
    print(
        f"{'Deleted' if args.yes else 'Would delete'} {made.masks:,} masks of {made.images:,} images in "
        f"'{args.label_field}', {made.files:,} of them in files; other labels, which are kept: {made.others:,}"
    )
    if made.evaluations:
        print(f"Evaluations of this field, which keep their figures: {', '.join(made.evaluations)}")
    if not args.yes:
        print("Nothing was deleted. Repeat the command with --yes to delete them.")


def run_repair(args: argparse.Namespace) -> int:
    """Repairs a dataset. Returns 1 if masks have no file; their samples are listed on stderr."""
    from .curation.repair import repair

    result = repair(load_dataset(args.dataset), args.mask_dir)
    for name in result.declared:
        print(f"declared again: {name}")
    for name in result.emptied:
        print(f"removed, since it had no values: {name}")
    if result.found:
        print(f"masks found in {args.mask_dir}: {result.found:,}")
    if result.is_sound:
        print(f"{args.dataset} is sound.")
    for sample_id, number in result.missing.items():
        print(f"sample {sample_id}: {number:,} masks have no file", file=sys.stderr)
    return 1 if result.missing else 0


def load_dataset(name: str) -> fo.Dataset:
    """The dataset with this name. Raises ArgumentError if it doesn't exist."""
    import fiftyone as fo

    if not fo.dataset_exists(name):
        raise ArgumentError(f"There is no dataset '{name}'.")
    return fo.load_dataset(name)


def add_parameters(command: argparse.ArgumentParser) -> None:
    """Adds the options for a model's parameters, as declared."""
    from .zoo.config import PARAMETERS  # here, so that the help of other commands need not wait for pydantic

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


if __name__ == "__main__":
    sys.exit(main())
