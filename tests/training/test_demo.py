"""The demo model's trainer."""

from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_decoder, load_encoder
from fiftyone_mobilesamv2.training.demo import ENCODER, train_demo
from fiftyone_mobilesamv2.training.masks import MaskSettings


def test_trained_weights_are_a_whole_sam(tmp_path, capsys):
    settings = MaskSettings(
        epochs=1, batch_size=2, learn="encoder", prompts_per_image=2, device="cpu", workers=0, from_scratch=True
    )
    file = train_demo(tmp_path, 2, settings)
    encoder = load_encoder(file, ENCODER)
    assert encoder.get_buffer("backbone.bn1.num_batches_tracked") == 1
    load_decoder(file, ENCODER)
    assert "loss=" in capsys.readouterr().err
