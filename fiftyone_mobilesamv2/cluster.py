"""Work on a dataset spread over a Ray cluster: workers, each with a model of its own, pull parts as they get free."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .shards import Shard

if TYPE_CHECKING:
    import fiftyone as fo

    Samples = fo.core.collections.SampleCollection

logger = logging.getLogger(__name__)

LOCAL = "local"
PARTS_PER_WORKER = 8  # so that none waits long for the last one
_TRIES = 3
_WEIGHTS_DIR_VARIABLE = "FIFTYONE_MOBILESAMV2_WEIGHTS_DIR"  # as in modeling/checkpoints.py, which needs torch

# A function of a part's samples, and of the part, that a worker makes once.
Work = Callable[["Samples", Shard], object]


class ClusterError(RuntimeError):
    """A cluster can't do the work."""


def on_cluster(
    samples: Samples,
    make_work: Callable[..., Work],
    arguments: tuple,
    group: str,
    cluster: str,
    workers: int | None,
    died: Callable[[Shard], None] = lambda shard: None,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[object]:
    """What `make_work(*arguments)(part of the samples, the part)` returns on workers, part by part in any order.

    A part whose worker dies is given to another one, twice at most.

    Args:
        group: of the parts.
        cluster: "auto" for the Ray cluster that this machine belongs to, its address, or "local" for one that is
            started here and ends with the work.
        workers: how many; None: one for each GPU of the cluster, or, without any, for each machine.
        died: told of a part before it is given to another worker.
        waiting: called about once a second.

    Raises:
        ClusterError: Ray isn't installed, or can't be reached; workers can't reach the database; or they keep dying.
        whatever the work raises: the others are stopped then.
    """
    ray = _ray()
    starts_here = not ray.is_initialized()
    if starts_here:
        try:
            ray.init(address=cluster, logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"The Ray cluster '{cluster}' can't be reached: {error}") from error
    actors: list = []
    try:
        count, resources = _workers(ray, workers)
        create = _actor_class(ray, resources, _environment(samples, ray), make_work, arguments)
        num_parts = count * PARTS_PER_WORKER
        pending = deque((Shard(index, num_parts, group), 1) for index in range(num_parts))
        running: dict = {}
        collection = _Collection(samples)
        actors += [create() for _ in range(min(count, len(pending)))]
        idle = list(actors)
        while pending or running:
            while pending and idle:
                actor, (part, tries) = idle.pop(), pending.popleft()
                running[actor.run.remote(collection, part)] = actor, part, tries
            for ref in ray.wait(list(running), timeout=1)[0]:
                actor, part, tries = running.pop(ref)
                try:
                    yield ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    if tries == _TRIES:
                        raise ClusterError(f"Workers died {tries} times at {part}, the last one so: {error}") from error
                    logger.warning("A worker died at %s, which another one takes over: %s", part, error)
                    died(part)
                    pending.appendleft((part, tries + 1))
                    actors.remove(actor)
                    actor = create()
                    actors.append(actor)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                idle.append(actor)
            waiting()
    finally:
        for actor in actors:
            ray.kill(actor)
        if starts_here:
            ray.shutdown()


def _ray() -> object:
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Work on a cluster needs Ray: pip install 'fiftyone-mobilesamv2[ray]'.") from error
    return ray


def _workers(ray: object, workers: int | None) -> tuple[int, dict]:
    """How many workers, and what each takes of the cluster."""
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    count = workers or gpus or sum(node["Alive"] for node in ray.nodes())
    return count, {"num_cpus": max(1, cpus // count), "num_gpus": min(1, gpus / count)}


def _environment(samples: Samples, ray: object) -> dict[str, str]:
    """Variables of the workers, the address of the database among them."""
    import fiftyone as fo
    import fiftyone.core.odm as foo

    uri = fo.config.database_uri
    if uri is None:  # FiftyOne has started one, for this machine alone
        host, port = foo.get_db_conn().client.address
        uri = f"mongodb://{host}:{port}/"
    if "://localhost" in uri or "://127." in uri:
        if len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) > 1:
            raise ClusterError(
                "The database is on this machine alone, and the cluster has others. Set FIFTYONE_DATABASE_URI to one "
                "that all of them reach."
            )
    found = {
        "FIFTYONE_DATABASE_URI": uri,
        "FIFTYONE_DATABASE_NAME": fo.config.database_name,
        "FIFTYONE_DEFAULT_DATASET_DIR": fo.config.default_dataset_dir,
        "FIFTYONE_DO_NOT_TRACK": str(fo.config.do_not_track),
    }
    if folder := os.environ.get(_WEIGHTS_DIR_VARIABLE):
        found[_WEIGHTS_DIR_VARIABLE] = folder
    return found


def _actor_class(ray: object, resources: dict, environment: dict, make_work: Callable, arguments: tuple) -> Callable:
    # As bytes: a worker has to know the database before it imports FiftyOne, which these need.
    work = ray.cloudpickle.dumps((make_work, arguments))
    actor = ray.remote(**resources)(_Worker)
    return lambda: actor.remote(environment, work, int(resources["num_cpus"]))


class _Worker:
    """A process of the cluster."""

    def __init__(self, environment: dict[str, str], work: bytes, threads: int) -> None:
        os.environ.update(environment)
        import torch

        torch.set_num_threads(threads)
        self._to_load = work
        self._work: Work | None = None

    def run(self, collection: _Collection, part: Shard) -> object:
        if self._work is None:  # not before: an error would be told as the death of this process
            import ray

            make, arguments = ray.cloudpickle.loads(self._to_load)
            self._work = make(*arguments)
        return self._work(collection.load(), part)


class _Collection:
    """A dataset or view, to be loaded in another process."""

    def __init__(self, samples: Samples) -> None:
        self._dataset = samples._root_dataset.name
        self._stages = samples.view()._serialize()

    def load(self) -> fo.DatasetView:
        import fiftyone as fo

        return fo.DatasetView._build(fo.load_dataset(self._dataset), self._stages)
