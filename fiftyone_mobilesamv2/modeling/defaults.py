"""Default settings and limits of the method, importable without torch: declarations and the command line need them."""

from __future__ import annotations

# Object discovery: the release's settings, and the paper's limit on prompts (table 6; the release keeps ultralytics'
# default of 300).
CONFIDENCE = 0.4
NMS_IOU = 0.9
MAX_PROMPTS = 320

# ultralytics' `max_nms`: only this many candidates, the most confident ones, enter NMS.
MAX_NMS_CANDIDATES = 30000

# SAM's grid search: the defaults of segment-anything's `SamAutomaticMaskGenerator`.
POINTS_PER_SIDE = 32
PRED_IOU_THRESH = 0.88
STABILITY_SCORE_THRESH = 0.95
BOX_NMS_THRESH = 0.7
MAX_POINTS_PER_SIDE = 256  # the number of cells along a side of the low-res logits
