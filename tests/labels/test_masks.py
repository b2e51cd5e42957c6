"""The format of masks in the database."""

import fiftyone.core.utils as fou
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fiftyone_mobilesamv2.labels.masks import serialized


@given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)), st.booleans())
def test_fiftyone_reads_serialized_masks(mask, transposed):
    mask = mask.T if transposed else mask
    read = fou.deserialize_numpy_array(serialized(mask))
    assert read.dtype == bool and np.array_equal(read, mask)
