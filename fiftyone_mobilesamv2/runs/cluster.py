"""Work on a dataset spread over a Ray cluster: workers, each with a model of its own, pull parts as they get free."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ArgumentError, ClusterError
from ..fiftyone_internals import restored_view, root_dataset, serialized_view
from ..modeling.checkpoints.downloads import DOWNLOAD_HOSTS_VARIABLE
from ..modeling.checkpoints.files import WEIGHTS_DIR_VARIABLE
from .shards import Shard

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
LOCAL = "local"
SHARDS_PER_WORKER = 8  # so that none waits long for the last one
_TRIES = 3
_START = 300  # seconds that workers may take
_VARIABLES = (WEIGHTS_DIR_VARIABLE, DOWNLOAD_HOSTS_VARIABLE)  # what workers take over where it is set
# A function of a part's samples, and of the part, that a worker makes once.
T = TypeVar("T")
Work = Callable[["SampleCollection", Shard], T]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and how many of its workers are asked for.

    Attributes:
        address: "auto" for the one that this machine belongs to, its address, or "local" for one that is started here
            and ends with the work.
        workers: how many; None: one for each GPU of the cluster, or, without any, for each machine.
    """

    address: str
    workers: int | None = None

    @classmethod
    def of(cls, cluster: str | None, workers: int | None) -> Cluster | None:
        """What a caller asks for; None without a cluster. Raises ArgumentError for one that can't be."""
        if not (cluster is None or (isinstance(cluster, str) and cluster)):
            raise ArgumentError(f"cluster must be 'auto', 'local' or an address, not {cluster!r}.")
        if workers is not None:
            if not isinstance(workers, Integral) or isinstance(workers, bool) or workers < 1:
                raise ArgumentError(f"workers must be a whole number of at least 1, not {workers!r}.")
            if cluster is None:
                raise ArgumentError("workers are those of a cluster: say which one, such as cluster='local'.")
        return None if cluster is None else cls(cluster, workers)


def on_cluster(
    samples: SampleCollection,
    make_work: Callable[..., Work[T]],
    arguments: tuple[object, ...],
    cluster: Cluster,
    *,
    group: str,
    died: Callable[[Shard], None] = lambda shard: None,
    waiting: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """What `make_work(*arguments)(part of the samples, the part)` returns on workers, part by part in any order.

    A part whose worker dies is given to another one, twice at most.

    Args:
        group: of the parts.
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
            ray.init(address=cluster.address, logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"The Ray cluster '{cluster.address}' can't be reached: {error}") from error
    actors: list[Any] = []
    try:
        count, resources = _workers(ray, cluster.workers)
        create = _actor_class(ray, resources, _environment(samples, ray), make_work, arguments)
        num_parts = count * SHARDS_PER_WORKER
        pending = deque((Shard(index, num_parts, group), 1) for index in range(num_parts))
        collection = _Collection(samples)
        running: dict[Any, tuple[Any, Shard, int]] = {}  # what it will return -> actor, part, tries
        failed_starts = 0
        starting: dict[Any, Any] = {}  # what it returns once it is there -> actor
        idle: list[Any] = []

        def start() -> None:
            actors.append(create())
            starting[actors[-1].is_there.remote()] = actors[-1]

        for _ in range(count):
            start()
        since = time.monotonic()
        while pending or running:
            while pending and idle:
                actor, (following, tries) = idle.pop(), pending.popleft()
                running[actor.run.remote(collection, following)] = actor, following, tries
            if running:
                since = time.monotonic()
            elif time.monotonic() - since > _START:
                raise ClusterError(
                    f"No worker could be started within {_START} s: each needs {resources} of the cluster, which has "
                    f"{ray.available_resources()} left. Ask for fewer, or stop other work."
                )
            part: Shard | None
            for ref in ray.wait([*running, *starting], timeout=1)[0]:
                if ref in starting:
                    actor, part, tries = starting.pop(ref), None, 1
                else:
                    actor, part, tries = running.pop(ref)
                try:
                    found = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:  # the worker, or what it has returned, is lost
                    ray.kill(actor)  # it may only be out of reach
                    actors.remove(actor)
                    failed_starts += part is None
                    if _TRIES in (tries, failed_starts):
                        where = "at their start" if part is None else f"at {part}"
                        raise ClusterError(f"Workers died {_TRIES} times {where}, the last one so: {error}") from error
                    if part is not None:
                        logger.warning("A worker died at %s, which another one takes over: %s", part, error)
                        died(part)
                        pending.appendleft((part, tries + 1))
                    start()
                else:
                    idle.append(actor)
                    if part is not None:
                        yield found
            waiting()
    finally:
        for actor in actors:
            ray.kill(actor)
        if starts_here:
            ray.shutdown()


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Work on a cluster needs Ray: pip install 'fiftyone-mobilesamv2[ray]'.") from error
    return ray


def _workers(ray: ModuleType, workers: int | None) -> tuple[int, dict[str, float]]:
    """How many workers, and what each takes of the cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    count = workers or gpus or len(nodes)
    if gpus:
        return count, {"num_cpus": 1, "num_gpus": 1 / math.ceil(count / gpus)}
    cpus = min(int(node.get("CPU", 0)) for node in nodes) or 1
    return count, {"num_cpus": max(1, cpus // math.ceil(count / len(nodes)))}


def _environment(samples: SampleCollection, ray: ModuleType) -> dict[str, str]:
    """Variables of the workers, the address of the database among them."""
    import fiftyone as fo
    import fiftyone.core.odm as foo
    from pymongo.uri_parser import parse_uri

    uri = fo.config.database_uri
    if uri is None:  # FiftyOne has started one, for this machine alone
        host, port = foo.get_db_conn().client.address
        uri = f"mongodb://{host}:{port}/"
    hosts = [host for host, _ in parse_uri(uri, warn=False)["nodelist"]] if "://" in uri else []
    if any(host == "localhost" or host.startswith("127.") for host in hosts):
        if len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) > 1:
            raise ClusterError(
                "The database is on this machine alone, and the cluster has others. Set FIFTYONE_DATABASE_URI to one "
                "that all of them reach."
            )
    found = {
        "FIFTYONE_DATABASE_URI": uri,
        "FIFTYONE_DATABASE_NAME": fo.config.database_name,
        "FIFTYONE_DATABASE_VALIDATION": str(fo.config.database_validation),
        "FIFTYONE_DATABASE_ADMIN": str(fo.config.database_admin),
        "FIFTYONE_DEFAULT_DATASET_DIR": fo.config.default_dataset_dir,
        "FIFTYONE_DO_NOT_TRACK": str(fo.config.do_not_track),
    }
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _actor_class(
    ray: ModuleType,
    resources: dict[str, float],
    environment: dict[str, str],
    make_work: Callable[..., Work[Any]],
    arguments: tuple[object, ...],
) -> Callable[[], Any]:
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
        self._work: Work[object] | None = None

    def is_there(self) -> bool:
        return True

    def run(self, collection: _Collection, part: Shard) -> object:
        if self._work is None:  # not before: an error would be told as the death of this process
            import ray

            make, arguments = ray.cloudpickle.loads(self._to_load)
            self._work = make(*arguments)
        return self._work(collection.load(), part)


class _Collection:
    """A dataset or view, to be loaded in another process."""

    def __init__(self, samples: SampleCollection) -> None:
        self._dataset = root_dataset(samples).name
        self._stages = serialized_view(samples)

    def load(self) -> SampleCollection:
        import fiftyone as fo

        dataset = fo.load_dataset(self._dataset)
        return restored_view(dataset, self._stages) if self._stages else dataset
