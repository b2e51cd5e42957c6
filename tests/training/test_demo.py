"""The demo model's trainers, and the files that the package carries."""

import pytest
from safetensors.torch import load_file

from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_decoder, load_detector, load_encoder
from fiftyone_mobilesamv2.training.demo import DETECTOR, ENCODER, SAM, package, train_demo_detector, train_demo_masks
from fiftyone_mobilesamv2.training.masks import MaskSettings


@pytest.mark.slow
def test_both_parts_are_trained_and_packaged(tmp_path, capsys):
    settings = MaskSettings(
        epochs=1,
        batch_size=2,
        learn="encoder",
        prompts_per_image=2,
        device="cpu",
        workers=0,
        untrained=("image_encoder",),
    )
    train_demo_masks(tmp_path / "masks", 2, settings)
    train_demo_detector(tmp_path / "discovery", scenes=2, validation=1, epochs=1, device="cpu")
    assert "loss=" in capsys.readouterr().err
    files = package(tmp_path, tmp_path / "packaged")
    assert [file.name for file in files] == [SAM, DETECTOR]
    encoder = load_encoder(files[0], ENCODER)
    assert encoder.get_buffer("backbone.bn1.num_batches_tracked") == 1
    load_decoder(files[0], ENCODER)
    load_detector(files[1])
    assert all(tensor.dtype.itemsize in (2, 8) for file in files for tensor in load_file(file).values())
