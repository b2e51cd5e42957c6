"""Types of the arrays that hold images, masks and numbers. Docstrings give their shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.uint8]  # RGB pixels, or object numbers in scenes
MaskArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]
AnyArray = npt.NDArray[Any]
