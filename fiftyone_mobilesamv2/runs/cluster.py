"""Distributes work on a dataset over a Ray cluster: idle workers, each with its own model, take the next shard."""

from __future__ import annotations

import importlib
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

from ..errors import ArgumentError, ClusterError, message_of, plain
from ..fiftyone_internals import restored_view, root_dataset, serialized_view
from ..modeling.checkpoints.downloads import DOWNLOAD_HOSTS_VARIABLE
from ..modeling.checkpoints.files import WEIGHTS_DIR_VARIABLE
from .shards import Shard
from .worker import Work, Worker

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
LOCAL = "local"
SHARDS_PER_WORKER = 8  # keeps the wait for the last shard short
_MAX_ATTEMPTS = 3
_MAX_START_TIME = 300  # seconds for a worker to start
_VARIABLES = (WEIGHTS_DIR_VARIABLE, DOWNLOAD_HOSTS_VARIABLE)  # copied to workers if set
T = TypeVar("T")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and the number of workers to use.

    Attributes:
        address: "auto" for the cluster of this machine, an address, or "local" for a cluster that is started on this
            machine and stopped after the work.
        workers: number of workers; None: one per GPU of the cluster or, without GPUs, one per machine.
    """

    address: str
    workers: int | None = None

    @classmethod
    def of(cls, cluster: str | None, workers: int | None) -> Cluster | None:
        """The cluster that a caller requests; None without one. Raises ArgumentError if the request is invalid."""
        if not (cluster is None or (isinstance(cluster, str) and cluster)):
            raise ArgumentError(f"cluster must be 'auto', 'local' or an address, not {plain(cluster)!r}.")
        if workers is not None:
            if not isinstance(workers, Integral) or isinstance(workers, bool) or workers < 1:
                raise ArgumentError(f"workers must be a whole number of at least 1, not {plain(workers)!r}.")
            if cluster is None:
                raise ArgumentError("workers requires a cluster, such as cluster='local'.")
        return None if cluster is None else cls(cluster, workers)


def on_cluster(
    samples: SampleCollection,
    make_work: Callable[..., Work[T]],
    arguments: tuple[object, ...],
    cluster: Cluster,
    *,
    group: str,
    on_worker_death: Callable[[Shard], None] = lambda shard: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """Yields the results of `make_work(*arguments)(samples of the shard, shard)` for all shards, in any order.

    If a worker dies, its shard is given to another worker, at most twice.

    Args:
        group: the group of the shards.
        on_worker_death: called with a dead worker's shard before another worker gets it.
        on_wait: called about once per second.

    Raises:
        ClusterError: Ray isn't installed or can't be reached, or ends on this machine; workers can't reach the
            database, or keep dying.
        Whatever the work raises: the other workers are then stopped.
    """
    ray = _ray()
    starts_here = not ray.is_initialized()
    if starts_here:
        try:
            ray.init(address=cluster.address, logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"The Ray cluster '{cluster.address}' can't be reached: {message_of(error)}") from error
    actors: list[Any] = []
    try:
        _check_own_node(ray)
        count, resources = _workers(ray, cluster.workers)
        create = _actor_class(ray, resources, _environment(samples, ray), make_work, arguments)
        num_shards = count * SHARDS_PER_WORKER
        pending = deque((Shard(index, num_shards, group), 1) for index in range(num_shards))
        collection = Collection(samples)
        running: dict[Any, tuple[Any, Shard, int]] = {}  # reference to the result -> actor, shard, attempts
        failed_starts = 0
        starting: dict[Any, Any] = {}  # reference that resolves after the start -> actor
        idle: list[Any] = []

        def start() -> None:
            actors.append(create())
            starting[actors[-1].is_ready.remote()] = actors[-1]

        for _ in range(count):
            start()
        since = time.monotonic()
        while pending or running:
            while pending and idle:
                actor, (next_shard, attempts) = idle.pop(), pending.popleft()
                running[actor.run.remote(collection, next_shard)] = actor, next_shard, attempts
            if running:
                since = time.monotonic()
            elif time.monotonic() - since > _MAX_START_TIME:
                raise ClusterError(
                    f"No worker could be started within {_MAX_START_TIME} s: each needs {resources} of the cluster, "
                    f"which has {ray.available_resources()} left. Request fewer workers, or stop other work."
                )
            shard: Shard | None
            for ref in ray.wait([*running, *starting], timeout=1)[0]:
                if ref in starting:
                    actor, shard, attempts = starting.pop(ref), None, 1
                else:
                    actor, shard, attempts = running.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:  # the worker, or its result, is lost
                    ray.kill(actor)  # it may just be unreachable
                    actors.remove(actor)
                    failed_starts += shard is None
                    if _MAX_ATTEMPTS in (attempts, failed_starts):
                        when = "at startup" if shard is None else f"while processing {shard}"
                        raise ClusterError(
                            f"Workers died {_MAX_ATTEMPTS} times {when}; the last error: {error}"
                        ) from error
                    if shard is not None:
                        logger.warning("A worker died while processing %s; another one takes it over: %s", shard, error)
                        on_worker_death(shard)
                        pending.appendleft((shard, attempts + 1))
                    start()
                else:
                    idle.append(actor)
                    if shard is not None:
                        yield result
            on_wait()
            _check_own_node(ray)
    finally:
        for actor in actors:
            ray.kill(actor)
        if starts_here:
            ray.shutdown()


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ClusterError("Work on a cluster needs Ray: pip install 'fiftyone-mobilesamv2[ray]'.") from error


def _check_own_node(ray: ModuleType) -> None:
    """Raises ClusterError if Ray's process on this machine has ended: Ray itself would wait for workers forever.

    A cluster notices that after about 15 seconds.
    """
    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == own):
        raise ClusterError(
            "Ray's process on this machine, raylet, has ended; perhaps it was killed because memory ran out. Repeat "
            "the same call to continue; if you have started Ray in this process, call ray.shutdown() first."
        )


def _workers(ray: ModuleType, workers: int | None) -> tuple[int, dict[str, float]]:
    """The number of workers, and the resources of each."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    count = workers or gpus or len(nodes)
    if gpus:
        return count, {"num_cpus": 1, "num_gpus": 1 / math.ceil(count / gpus)}
    cpus = min(int(node.get("CPU", 0)) for node in nodes) or 1
    return count, {"num_cpus": max(1, cpus // math.ceil(count / len(nodes)))}


def _environment(samples: SampleCollection, ray: ModuleType) -> dict[str, str]:
    """The workers' environment variables, including the address of the database."""
    import fiftyone as fo
    import fiftyone.core.odm as foo
    from pymongo.uri_parser import parse_uri

    uri = fo.config.database_uri
    if uri is None:  # FiftyOne has started a database for this machine only
        host, port = foo.get_db_conn().client.address
        uri = f"mongodb://{host}:{port}/"
    hosts = [host for host, _ in parse_uri(uri, warn=False)["nodelist"]] if "://" in uri else []
    if any(host == "localhost" or host.startswith("127.") for host in hosts):
        if len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) > 1:
            raise ClusterError(
                "The database is only reachable from this machine, but the cluster has several. Set "
                "FIFTYONE_DATABASE_URI to a database that all of them can reach."
            )
    environment = {
        "FIFTYONE_DATABASE_URI": uri,
        "FIFTYONE_DATABASE_NAME": fo.config.database_name,
        "FIFTYONE_DATABASE_VALIDATION": str(fo.config.database_validation),
        "FIFTYONE_DATABASE_ADMIN": str(fo.config.database_admin),
        "FIFTYONE_DEFAULT_DATASET_DIR": fo.config.default_dataset_dir,
        "FIFTYONE_MODEL_ZOO_DIR": fo.config.model_zoo_dir,  # where trained models are found by name
        "FIFTYONE_DO_NOT_TRACK": str(fo.config.do_not_track),
    }
    return environment | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _actor_class(
    ray: ModuleType,
    resources: dict[str, float],
    environment: dict[str, str],
    make_work: Callable[..., Work[Any]],
    arguments: tuple[object, ...],
) -> Callable[[], Any]:
    # As bytes, because unpickling imports FiftyOne, which must happen after the worker has set the database's address.
    work = ray.cloudpickle.dumps((make_work, arguments))
    actor = ray.remote(**resources)(Worker)
    return lambda: actor.remote(environment, work, int(resources["num_cpus"]))


class Collection:
    """A dataset or view that can be loaded in another process."""

    def __init__(self, samples: SampleCollection) -> None:
        self._dataset = root_dataset(samples).name
        self._stages = serialized_view(samples)

    def load(self) -> SampleCollection:
        import fiftyone as fo

        dataset = fo.load_dataset(self._dataset)
        return restored_view(dataset, self._stages) if self._stages else dataset
