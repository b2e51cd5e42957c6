"""Threads that share a step's images: the gradients are those of one thread, the same in every run."""

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDetector
from fiftyone_mobilesamv2.training.gradients import Gradients
from fiftyone_mobilesamv2.training.prompted_images import PromptedImages

from .conftest import simple_example
from .test_masks import CONFIG, demo_networks

DEVICE = torch.device("cpu")


@pytest.fixture
def networks():
    torch.manual_seed(0)
    networks = demo_networks(detector=EmbeddingDetector(128, 8))
    networks.modules.eval()
    networks.detector.detect.train()  # it gives the loss what it needs only then
    return networks


@pytest.fixture(scope="module")
def images():
    of_five = PromptedImages([simple_example(i) for i in range(5)], CONFIG, 4, seed=0)
    return [of_five.item(0, i) for i in range(5)]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def computed(networks, images, batch_size=8):
    with Gradients(networks, True, DEVICE, batch_size) as gradients:
        # One by one: the loss of object discovery is divided by the number of objects that are looked at together.
        loss = gradients.backward(images, at_once=1)
    found = {name: each.grad.clone() for name, each in networks.modules.named_parameters() if each.grad is not None}
    return loss, found


def freeze_statistics(networks):
    for module in networks.modules.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def test_threads_give_the_gradients_of_one_thread(networks, images, set_threads):
    freeze_statistics(networks)
    set_threads(1)
    loss, expected = computed(networks, images)
    for threads in (2, 3, 8):  # with 8, some threads have nothing to do
        set_threads(threads)
        of_threads, found = computed(networks, images)
        assert of_threads == pytest.approx(loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(1 + gradient.abs().max()))
        assert torch.get_num_threads() == threads


def test_every_run_gives_the_same_bits(networks, images, set_threads):
    freeze_statistics(networks)
    set_threads(2)
    loss, expected = computed(networks, images)
    for _ in range(5):
        again, found = computed(networks, images)
        assert again == loss
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_weights_are_shared_and_statistics_averaged(networks, images, set_threads):
    norms = {name: each for name, each in networks.modules.named_modules() if isinstance(each, _BatchNorm)}
    learning = {name: each for name, each in norms.items() if each.training}
    assert 0 < len(learning) < len(norms)
    before = {name: each.running_mean.clone() for name, each in norms.items()}

    def mean_after(of_images, threads):
        for name, norm in norms.items():
            norm.running_mean.copy_(before[name])
        set_threads(threads)
        computed(networks, of_images)
        return {name: each.running_mean.clone() for name, each in norms.items()}

    first, second = mean_after(images[:1], 1), mean_after(images[1:2], 1)
    for name, found in mean_after(images[:2], 2).items():
        expected = (first[name] + second[name]) / 2 if name in learning else before[name]
        torch.testing.assert_close(found, expected)

    # A step of an optimizer is seen by all threads.
    freeze_statistics(networks)
    loss, _ = computed(networks, images)
    with torch.no_grad():
        for each in networks.modules.parameters():
            each.add_(0.2 * torch.randn_like(each) * each.std(correction=0))
    set_threads(1)
    expected, _ = computed(networks, images)
    set_threads(2)
    found, _ = computed(networks, images)
    assert found == pytest.approx(expected, rel=1e-5) and found != pytest.approx(loss, rel=1e-3)
