"""Disjoint parts of a collection, for several processes to work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bson import ObjectId

from ..errors import ArgumentError
from ..fiftyone_internals import root_dataset
from . import retry as database
from .retry import retry_while_unavailable

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

# Knuth's multiplicative hashing (The Art of Computer Programming, 6.4): 2^32 over the golden ratio. Ids end in a
# counter of 24 bits, of which labels take numbers, too: samples with three labels each are four apart.
_FACTOR, _RANGE = 2654435761, 2**32
_DIGITS = 6  # of an id, hexadecimal: its counter
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Shard:
    """One of the parts.

    To which one a sample belongs is decided by its id: nothing has to be listed, and samples that come and go change
    nothing for the others.

    Attributes:
        index: from 0 to `count` - 1.
        count: how many parts there are.
        group: the same for all parts of one piece of work.
    """

    index: int
    count: int
    group: str

    def __post_init__(self) -> None:
        if not isinstance(self.group, str):  # it becomes part of queries
            raise ArgumentError(f"The group of a part is a text, not {self.group!r}.")
        if not (1 <= self.count <= MAX_SHARDS and 0 <= self.index < self.count):
            raise ArgumentError(
                f"Part {self.index} of {self.count}: at most {MAX_SHARDS:,} parts, counted from 0, were expected."
            )

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.count}"

    def of(self, samples: SampleCollection) -> fo.DatasetView:
        """The samples of this part."""
        collection = root_dataset(samples)._sample_collection

        def mine() -> list[ObjectId]:
            # Of the index: faster than if the database read every sample and did the same sum.
            ids = (document["_id"] for document in collection.find({}, {"_id": True}).hint("_id_"))
            return [id for id in ids if self.has(str(id))]

        ids = retry_while_unavailable(mine)
        if len(ids) <= database.MAX_IDS:
            return samples.match({"_id": {"$in": ids}})
        # What `has` does, in the database.
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
        """Whether a sample, there or deleted since, belongs to this part."""
        hashed = int(sample_id[-_DIGITS:], 16) * _FACTOR % _RANGE
        return hashed * self.count // _RANGE == self.index
