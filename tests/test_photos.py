"""Real photos through `apply_model`: 128 by the demo model, some by released architectures with seeded weights."""

import json

import fiftyone as fo
import numpy as np
import pytest

from fiftyone_mobilesamv2 import quickstart, zoo

FIELD = quickstart.LABEL_FIELD


@pytest.fixture
def photo_dataset(dataset, photos):
    names = [entry["file_name"] for entry in json.loads((photos / "instances.json").read_text())["images"]]
    dataset.add_samples([fo.Sample(str(photos / "images" / name)) for name in names])
    dataset.compute_metadata()
    return dataset


def check_stored(dataset):
    for sample in dataset:
        size = sample.metadata.height, sample.metadata.width
        for detection in sample[FIELD].detections:
            mask = detection.get_mask() > 0
            x0, y0 = (round(v * side) for v, side in zip(detection.bounding_box, size[::-1]))
            x1, y1 = x0 + mask.shape[1], y0 + mask.shape[0]
            assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
            np.testing.assert_allclose(
                detection.bounding_box, [x0 / size[1], y0 / size[0], (x1 - x0) / size[1], (y1 - y0) / size[0]]
            )
            assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()  # tight
            assert detection.area_px == mask.sum()


@pytest.mark.slow
def test_demo_model_stores_valid_masks(photo_dataset):
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu")
    photo_dataset.apply_model(model, FIELD, batch_size=8, num_workers=2)
    assert len(photo_dataset) == 128 and photo_dataset.exists(FIELD).count() == 128
    assert photo_dataset.count(f"{FIELD}.detections") > 128
    check_stored(photo_dataset)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, encoder, first",
    [("mobilesamv2-tinyvit-torch", "tiny_vit", 0), ("mobilesamv2-efficientvit-l0-torch", "efficientvit_l0", 1)],
)
def test_released_architectures_store_valid_masks(photo_dataset, seeded, name, encoder, first):
    """An eighth of the sizes each: with noise for weights, nothing else of a photo matters to a mask's geometry."""
    by_size = {(sample.metadata.height, sample.metadata.width): sample.id for sample in photo_dataset}
    photos = photo_dataset.select([by_size[size] for size in sorted(by_size)[first::8]])
    assert len(photos) == 7
    # Seeded detectors find hundreds of boxes whose masks are noise all over the image; a few are enough.
    model = zoo.load_model(
        name,
        device="cpu",
        max_prompts=8,
        encoder_checkpoint=str(seeded.encoder_checkpoint(encoder)),
        decoder_checkpoint=str(seeded.decoder_checkpoint()),
        detector_checkpoint=str(seeded.detector_checkpoint),
    )
    photos.apply_model(model, FIELD, batch_size=8, num_workers=2)
    assert photos.exists(FIELD).count() == len(photos)
    check_stored(photos)
