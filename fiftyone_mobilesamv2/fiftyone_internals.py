"""The only module that uses private names of FiftyOne; tests/test_fiftyone_internals.py tests each of them.

Written for FiftyOne 1.22. Anything with a public equivalent is not here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import fiftyone as fo
import fiftyone.core.clips as focl
import fiftyone.core.evaluation as foe
import fiftyone.core.models as fom
import fiftyone.core.patches as fop
import fiftyone.core.sample as fos
import fiftyone.core.video as fov
from bson import ObjectId, json_util
from fiftyone.core.odm.dataset import SampleFieldDocument
from fiftyone.core.odm.utils import create_field

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.runs import BaseRun, BaseRunResults
    from fiftyone.core.stages import ViewStage
    from pymongo import UpdateMany, UpdateOne
    from pymongo.collection import Collection

FRAMES_PREFIX = "frames."  # prefix of frame fields' names

Document = dict[str, Any]  # a MongoDB document or query; users and FiftyOne define its fields


# Collections ---------------------------------------------------------------------------------------------------------


def root_dataset(samples: SampleCollection) -> fo.Dataset:
    """The dataset behind a view, also for a view of patches, clips or frames."""
    return samples._root_dataset


def source_dataset(samples: SampleCollection) -> fo.Dataset:
    """The dataset that contains a view's samples; for patches, clips and frames, one that FiftyOne generated."""
    return samples._dataset


def is_patches_view(samples: SampleCollection) -> bool:
    """Whether it is a view of patches, or the dataset that FiftyOne generated for one."""
    return isinstance(samples, fop._PatchesView) or samples._is_patches


def is_frames_view(samples: SampleCollection) -> bool:
    """Whether it is a view of video frames, or the dataset that FiftyOne generated for one."""
    return isinstance(samples, fov.FramesView) or samples._is_frames


def is_clips_view(samples: SampleCollection) -> bool:
    """Whether it is a view of video clips, or the dataset that FiftyOne generated for one."""
    return isinstance(samples, focl.ClipsView) or samples._is_clips


def is_generated(samples: SampleCollection) -> bool:
    """Whether its samples are patches, clips or frames that FiftyOne generated from the dataset's samples."""
    return bool(samples._is_generated)


def contains_videos(samples: SampleCollection) -> bool:
    """Whether its samples, or the slices of its groups, include videos."""
    return bool(samples._contains_videos())


def select_all_slices(dataset: fo.Dataset) -> fo.DatasetView:
    """The samples of all slices of a grouped dataset, even with different media types."""
    return dataset.select_group_slices(_allow_mixed=True)


def is_dynamic_groups(samples: SampleCollection) -> bool:
    """Whether it shows dynamic groups: those of :meth:`fiftyone.core.collections.SampleCollection.group_by`."""
    return bool(samples._is_dynamic_groups)


def samples_of_dynamic_groups(view: fo.DatasetView) -> fo.DatasetView:
    """All samples of the dynamic groups that a view shows."""
    samples: fo.DatasetView = view._parse_dynamic_groups()[2]
    if view._stages[-1].outputs_dynamic_groups:
        return samples
    # Later stages may leave groups out. FiftyOne can't select samples of a view with the stage `Flatten` itself.
    return samples.select(view.flatten().values("id"))


def view_stages(samples: SampleCollection) -> list[ViewStage]:
    """The stages of a view, without those of the view behind its patches or frames; empty for a dataset."""
    return getattr(samples, "_stages", [])


def all_view_stages(view: fo.DatasetView) -> list[ViewStage]:
    """The stages of a view, including those of the view behind its patches or frames."""
    stages: list[ViewStage] = view._all_stages
    return stages


def serialized_view(samples: SampleCollection, include_uuids: bool = True) -> list[Document]:
    """A view as plain data, from which :func:`restored_view` restores it."""
    stages: list[Document] = samples.view()._serialize(include_uuids=include_uuids)
    return stages


def restored_view(dataset: fo.Dataset, stages: list[Document]) -> fo.DatasetView:
    """Restores a view from the data of :func:`serialized_view`."""
    return fo.DatasetView._build(dataset, stages)


# Fields --------------------------------------------------------------------------------------------------------------


def is_frame_field(samples: SampleCollection, name: str) -> bool:
    """Whether a field is a frame field of these samples."""
    return bool(samples._is_frame_field(name))


def split_frame_field(samples: SampleCollection, name: str) -> tuple[str, bool]:
    """A field's name without "frames.", and whether it is a frame field of these samples."""
    field_name, is_frame = samples._handle_frame_field(name)
    return field_name, is_frame


def label_root(samples: SampleCollection, name: str) -> tuple[str, bool]:
    """The path of a field's individual labels, such as "x.detections", and whether they are in a list."""
    root, is_list = samples._get_label_field_root(name)
    return root, is_list


def label_path(samples: SampleCollection, name: str, attribute: str | None = None) -> str:
    """The path of a field's individual labels, or of one of their attributes, such as "x.detections.id"."""
    path: str = samples._get_label_field_path(name, attribute)[1]
    return path


def label_type(samples: SampleCollection, name: str) -> type[fo.Label]:
    """The class of a field's labels."""
    kind: type[fo.Label] = samples._get_label_field_type(name)
    return kind


def field_document(name: str, ftype: type[fo.Field], **options: Any) -> Document:
    """The entry of a new field in the schema of its dataset's document.

    Args:
        options: the arguments `embedded_doc_type`, `description` and `info` of `add_sample_field`.
    """
    field = create_field(name, ftype, **options)
    return dict(SampleFieldDocument.from_field(field).to_mongo())


def add_to_sidebar_group(dataset: fo.Dataset, paths: Sequence[str], name: str) -> None:
    """Shows fields in a group of the App's sidebar, creating the group if necessary."""
    dataset._add_paths_to_sidebar_group(list(paths), name)


def rename_sidebar_group(samples: SampleCollection, name: str, new_name: str) -> None:
    """Renames a group of the App's sidebar, if it exists."""
    samples._rename_sidebar_group(name, new_name)


def delete_empty_sidebar_group(samples: SampleCollection, name: str) -> None:
    """Deletes a group of the App's sidebar, if it exists and is empty."""
    samples._delete_empty_sidebar_group(name)


# Runs ----------------------------------------------------------------------------------------------------------------


def has_results(dataset: fo.Dataset, eval_key: str) -> bool:
    """Whether an evaluation has stored results; one that was interrupted has none."""
    return bool(foe.EvaluationMethod._get_run_doc(dataset, eval_key).results)


def run_view(samples: SampleCollection) -> list[str] | None:
    """The stages of the view that a run is about, in the format of the run's document; None for a dataset."""
    if isinstance(samples, fo.Dataset):
        return None
    return [json_util.dumps(stage) for stage in samples._serialize(include_uuids=False)]


def replace_run_results(
    run: type[BaseRun],
    samples: SampleCollection,
    key: str,
    results: BaseRunResults,
    cache: bool = True,
    **values: object,
) -> None:
    """Stores a run's results, and other values of its document.

    FiftyOne deletes earlier results before it stores new ones. Here, a single update of the document replaces them.

    Args:
        run: the class of the run.
        cache: whether to keep the results in memory.

    Raises:
        ValueError: the run was deleted in the meantime.
    """
    document, cached = run._get_run_doc(samples, key), getattr(samples._root_dataset, run._results_cache_field())
    files, earlier = document.results.fs, document.results.grid_id
    content = json_util.dumps(results.serialize()).encode()
    file = files.put(content, content_type="application/json")
    values |= {"results": file, "results_meta": dict(results.get_meta() or {})}
    if not document._get_collection().update_one({"_id": document.id}, {"$set": values}).matched_count:
        files.delete(file)
        raise ValueError(f"'{key}' of {samples._root_dataset.name} was deleted in the meantime.")
    document.reload()
    if earlier is not None:
        files.delete(earlier)
    previous = cached.pop(key, None)
    if previous is not None and previous is not results:
        previous._key = None
    if cache:
        cached[key] = results


# Models --------------------------------------------------------------------------------------------------------------


def apply_model_variables() -> dict[str, Any] | None:
    """The local variables of the running `apply_model`, which tells a model nothing about its samples; None outside."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not fom.apply_model.__code__:
        frame = frame.f_back
    return None if frame is None else dict(frame.f_locals)


def forget_zoo_models() -> None:
    """Makes FiftyOne look again which zoo models there are, and load them again when they are requested."""
    import fiftyone.zoo.models as fozm  # not at the top: it imports torch

    fozm._invalidate_zoo_models_manifest()
    fozm._MODELS.clear()


# The database --------------------------------------------------------------------------------------------------------


def dataset_id(dataset: fo.Dataset) -> ObjectId:
    """The id of a dataset's document."""
    id: ObjectId = dataset._doc.id
    return id


def reload_list_of_runs(dataset: fo.Dataset) -> None:
    """Reloads the list of a dataset's runs, which other processes may have changed."""
    dataset._doc.reload("runs")


def sync_schema(dataset: fo.Dataset) -> None:
    """Declares the fields that other processes have added to a dataset, also for its samples in memory.

    Unlike `Dataset.reload`, it does not load samples, which fails if one of them has an invalid value.
    """
    dataset._doc.reload()
    _declare_in_memory(dataset, dataset._sample_doc_cls, dataset._doc.sample_fields, "")
    if dataset._frame_doc_cls is not None:
        _declare_in_memory(dataset, dataset._frame_doc_cls, dataset._doc.frame_fields, "")


def declared_names(dataset: fo.Dataset, of_frames: bool) -> list[str]:
    """The names, in the database, of the fields in the dataset's document, see :func:`sync_schema`."""
    fields = dataset._doc.frame_fields if of_frames else dataset._doc.sample_fields
    return [field.db_field or field.name for field in fields]


def _declare_in_memory(dataset: fo.Dataset, documents: Any, fields: Sequence[SampleFieldDocument], root: str) -> None:
    for field in fields or ():
        path = f"{root}{field.name}"
        known, _ = documents._get_field(path, allow_missing=True, check_default=True)
        if known is None:
            _, parent, _, _ = documents._parse_path(path)
            parent._declare_field(dataset, path, field.to_field())
        else:
            _declare_in_memory(dataset, documents, field.fields, f"{path}.")


def sample_collection(dataset: fo.Dataset) -> Collection[Document]:
    """The MongoDB collection of a dataset's samples."""
    collection: Collection[Document] = dataset._sample_collection
    return collection


def frame_collection(dataset: fo.Dataset) -> Collection[Document] | None:
    """The MongoDB collection of a dataset's video frames; None without videos."""
    collection: Collection[Document] | None = dataset._frame_collection
    return collection


def aggregate(samples: SampleCollection, **pipeline: object) -> Iterator[Document]:
    """The database documents of samples or, with frames_only=True, of frames.

    Args:
        pipeline: FiftyOne's arguments `pipeline`, or `post_pipeline` and `frames_only`.
    """
    documents: Iterator[Document] = samples._aggregate(**pipeline)
    return documents


def bulk_write(
    dataset: fo.Dataset,
    operations: Sequence[UpdateOne | UpdateMany],
    ids: Sequence[ObjectId] | None = None,
    frames: bool = False,
    ordered: bool = False,
) -> None:
    """Executes PyMongo operations, and reloads the samples or frames `ids` that are in memory (None: all)."""
    dataset._bulk_write(operations, ids=ids, frames=frames, ordered=ordered)


def reload_samples(dataset: fo.Dataset, ids: Sequence[str]) -> None:
    """Reloads these samples if they are in memory."""
    fos.Sample._reload_docs(dataset._sample_collection_name, sample_ids=ids)
