"""What the commands do, and print. The help need not wait for what they import."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..errors import ArgumentError, DownloadError

if TYPE_CHECKING:
    import fiftyone as fo


def run_segment(args: argparse.Namespace) -> int:
    """Segments a dataset. Returns 1 if images failed; they are listed on stderr."""

    from ..runs.segment import segment_everything
    from ..zoo.config import PARAMETERS, MobileSAMv2ModelConfig

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


_OF_TRAINING = (
    *("name", "part", "base", "epochs", "batch_size", "learning_rate", "unlabeled", "discovery", "size", "teacher"),
    *("learn", "seed", "device", "output", "keep_worse"),
)


def run_train(args: argparse.Namespace) -> int:
    """Trains a model. Returns 1 if it is not better than its base, and was not kept."""
    from ..training.train import train

    try:
        run = train(
            load_dataset(args.dataset),
            args.label_field,
            validation=args.validation_tag or args.validation,
            **{name: getattr(args, name) for name in _OF_TRAINING},
        )
    except KeyboardInterrupt:
        print("\nRepeat the command to go on from the last save.", file=sys.stderr)
        raise
    print(run)
    return 0 if run.registered else 1


def run_models(args: argparse.Namespace) -> int:
    """Lists models, or works on the files of one. Returns 1 if a file or source is wrong."""
    from tqdm import tqdm

    from ..modeling.checkpoints import files, overview, trained
    from ..modeling.checkpoints.lookup import all_files, find_trained
    from ..modeling.checkpoints.sources import check_sources

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
    from .. import zoo
    from ..evaluation import reproduction

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
    from ..evaluation.proposal_results import ProposalResults, comparison_table
    from ..evaluation.proposals import evaluate_proposals

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
    from ..runs.deletion import delete_masks, made_masks

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
    from ..curation.repair import repair

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
