"""The one place that touches names of FiftyOne that are not public; tests/test_fiftyone_internals.py tests each.

Read in FiftyOne 1.22. What has a public way isn't here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import fiftyone as fo
import fiftyone.core.clips as focl
import fiftyone.core.patches as fop
import fiftyone.core.sample as fos
import fiftyone.core.video as fov
from bson import ObjectId

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection
    from fiftyone.core.stages import ViewStage
    from pymongo import UpdateMany, UpdateOne
    from pymongo.collection import Collection

FRAMES_PREFIX = "frames."  # of names of fields of videos' frames

Document = dict[str, Any]  # what MongoDB holds, or is asked: its fields are whatever users and FiftyOne have made them


# Collections ---------------------------------------------------------------------------------------------------------


def root_dataset(samples: SampleCollection) -> fo.Dataset:
    """The dataset that a view is of, also where it is one of patches, clips or frames."""
    return samples._root_dataset


def source_dataset(samples: SampleCollection) -> fo.Dataset:
    """The dataset that a view's samples are in: of patches, clips and frames, one that FiftyOne has made for it."""
    return samples._dataset


def is_patches_view(samples: SampleCollection) -> bool:
    """Whether it, or the dataset that FiftyOne has made for it, is of patches."""
    return isinstance(samples, fop._PatchesView) or samples._is_patches


def is_frames_view(samples: SampleCollection) -> bool:
    """Whether it, or the dataset that FiftyOne has made for it, is of the frames of videos."""
    return isinstance(samples, fov.FramesView) or samples._is_frames


def is_clips_view(samples: SampleCollection) -> bool:
    """Whether it, or the dataset that FiftyOne has made for it, is of clips of videos."""
    return isinstance(samples, focl.ClipsView) or samples._is_clips


def is_generated(samples: SampleCollection) -> bool:
    """Whether its samples are patches, clips or frames, which FiftyOne has made of the dataset's own."""
    return bool(samples._is_generated)


def contains_videos(samples: SampleCollection) -> bool:
    """Whether there are videos among its samples, or in slices of its groups."""
    return bool(samples._contains_videos())


def select_all_slices(dataset: fo.Dataset) -> fo.DatasetView:
    """The samples of all slices of a grouped dataset, also where these are of different media."""
    return dataset.select_group_slices(_allow_mixed=True)


def view_stages(samples: SampleCollection) -> list[ViewStage]:
    """The stages of a view, without those of the view that its patches or frames are of; none of a dataset."""
    return getattr(samples, "_stages", [])


def all_view_stages(view: fo.DatasetView) -> list[ViewStage]:
    """The stages of a view, with those of the view that its patches or frames are of."""
    stages: list[ViewStage] = view._all_stages
    return stages


def serialized_view(samples: SampleCollection, include_uuids: bool = True) -> list[Document]:
    """A view as plain data, from which :func:`restored_view` makes it again."""
    stages: list[Document] = samples.view()._serialize(include_uuids=include_uuids)
    return stages


def restored_view(dataset: fo.Dataset, stages: list[Document]) -> fo.DatasetView:
    """The view that :func:`serialized_view` was given."""
    return fo.DatasetView._build(dataset, stages)


# Fields --------------------------------------------------------------------------------------------------------------


def is_frame_field(samples: SampleCollection, name: str) -> bool:
    """Whether a field is one of videos' frames there."""
    return bool(samples._is_frame_field(name))


def split_frame_field(samples: SampleCollection, name: str) -> tuple[str, bool]:
    """A field's name without "frames.", and whether it is one of videos' frames there."""
    field, of_frames = samples._handle_frame_field(name)
    return field, of_frames


def label_root(samples: SampleCollection, name: str) -> tuple[str, bool]:
    """Where the single labels of a field are, such as "x.detections", and whether they are in a list."""
    root, is_list = samples._get_label_field_root(name)
    return root, is_list


def label_path(samples: SampleCollection, name: str, attribute: str | None = None) -> str:
    """Where the single labels of a field, or an attribute of theirs, are, such as "x.detections.id"."""
    path: str = samples._get_label_field_path(name, attribute)[1]
    return path


def label_type(samples: SampleCollection, name: str) -> type[fo.Label]:
    """The class of a field's labels."""
    kind: type[fo.Label] = samples._get_label_field_type(name)
    return kind


def add_to_sidebar_group(dataset: fo.Dataset, paths: Sequence[str], name: str) -> None:
    """Shows fields in a group of the App's sidebar, creating the group if necessary."""
    dataset._add_paths_to_sidebar_group(list(paths), name)


def rename_sidebar_group(samples: SampleCollection, name: str, new_name: str) -> None:
    """Renames a group of the App's sidebar, if there is one of that name."""
    samples._rename_sidebar_group(name, new_name)


def delete_empty_sidebar_group(samples: SampleCollection, name: str) -> None:
    """Deletes a group of the App's sidebar, if there is one of that name and nothing in it."""
    samples._delete_empty_sidebar_group(name)


# The database --------------------------------------------------------------------------------------------------------


def dataset_id(dataset: fo.Dataset) -> ObjectId:
    """The id of a dataset's document."""
    id: ObjectId = dataset._doc.id
    return id


def reload_list_of_runs(dataset: fo.Dataset) -> None:
    """Reads anew which runs a dataset has: other processes may have added some."""
    dataset._doc.reload("runs")


def sample_collection(dataset: fo.Dataset) -> Collection[Document]:
    """The documents of a dataset's samples."""
    collection: Collection[Document] = dataset._sample_collection
    return collection


def frame_collection(dataset: fo.Dataset) -> Collection[Document] | None:
    """The documents of the frames of a dataset's videos; None without any."""
    collection: Collection[Document] | None = dataset._frame_collection
    return collection


def aggregate(samples: SampleCollection, **pipeline: object) -> Iterator[Document]:
    """The documents of samples or, with frames_only=True, of frames, as the database has them.

    Args:
        pipeline: `pipeline`, or `post_pipeline` and `frames_only`, as FiftyOne has them.
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
    """Carries out operations of pymongo, and reloads the samples or frames `ids` that are in memory; all for None."""
    dataset._bulk_write(operations, ids=ids, frames=frames, ordered=ordered)


def reload_samples(dataset: fo.Dataset, ids: Sequence[str]) -> None:
    """Reloads those of these samples that are in memory."""
    fos.Sample._reload_docs(dataset._sample_collection_name, sample_ids=ids)
