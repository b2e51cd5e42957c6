"""Disjoint shards of a collection, so that several processes can work on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bson import ObjectId

from ..errors import ArgumentError, plain
from ..fiftyone_internals import root_dataset
from . import retry as database
from .retry import retry_while_unavailable

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

# Knuth's multiplicative hashing (The Art of Computer Programming, 6.4): 2^32 divided by the golden ratio. Ids end in a
# 24-bit counter that labels increment, too: the ids of samples with three labels each are four apart.
_FACTOR, _RANGE = 2654435761, 2**32
_DIGITS = 6  # hexadecimal digits of an id's counter
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Shard:
    """One shard of a collection.

    A sample's id determines its shard: no list of samples is needed, and adding or deleting samples does not move
    others to another shard.

    Attributes:
        index: from 0 to `count` - 1.
        count: the number of shards.
        group: an identifier that all shards of one run share.
    """

    index: int
    count: int
    group: str

    def __post_init__(self) -> None:
        if not isinstance(self.group, str):  # it is used in queries
            raise ArgumentError(f"The group of a shard must be a string, not {plain(self.group)!r}.")
        if not (1 <= self.count <= MAX_SHARDS and 0 <= self.index < self.count):
            raise ArgumentError(
                f"Shard {self.index} of {self.count} is invalid: at most {MAX_SHARDS:,} shards, numbered from 0."
            )

    def __str__(self) -> str:
        return f"shard {self.index + 1} of {self.count}"

    def of(self, samples: SampleCollection) -> fo.DatasetView:
        """The samples of this shard."""
        collection = root_dataset(samples)._sample_collection

        def ids_in_shard() -> list[ObjectId]:
            # Read from the index, which is faster than computing the hash of every sample in the database.
            ids = (document["_id"] for document in collection.find({}, {"_id": True}).hint("_id_"))
            return [id for id in ids if self.has(str(id))]

        ids = retry_while_unavailable(ids_in_shard)
        if len(ids) <= database.MAX_IDS:
            return samples.match({"_id": {"$in": ids}})
        # The same computation as in `has`, in the database.
        digits = {"$substrBytes": [{"$toString": "$_id"}, 24 - _DIGITS, _DIGITS]}
        number = {
            "$sum": [
                {
                    "$multiply": [
                        {"$indexOfBytes": ["0123456789abcdef", {"$substrBytes": [digits, place, 1]}]},
                        16 ** (_DIGITS - 1 - place),
                    ]
                }
                for place in range(_DIGITS)
            ]
        }
        hashed = {"$mod": [{"$multiply": [number, _FACTOR]}, _RANGE]}
        index = {"$floor": {"$divide": [{"$multiply": [hashed, self.count]}, _RANGE]}}
        return samples.match({"$expr": {"$eq": [index, self.index]}})

    def has(self, sample_id: str) -> bool:
        """Whether a sample, which may have been deleted, belongs to this shard."""
        hashed = int(sample_id[-_DIGITS:], 16) * _FACTOR % _RANGE
        return hashed * self.count // _RANGE == self.index
