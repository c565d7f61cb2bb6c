"""Networks of timm and torchvision at every depth: loss, gradients and buffers bit for bit, and less is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.memory.simulated import SimulatedDevice
from adaptive_trainer.models.recomputing import keeper
from adaptive_trainer.models.recomputing.plan import NONE, blocks_of
from adaptive_trainer.models.savers.recompute import apply as recompute
from adaptive_trainer.models.zoo import build_model

pytestmark = pytest.mark.slow

KiB = 2**10
SIZES = {  # of images: small ones, where the network takes them
    "efficientnet_b0": 64,
    "efficientnetv2_rw_t": 64,
    "resnet50": 64,
    "regnety_008": 64,
    "mobilenetv3_large_100": 64,
    "densenet121": 64,
    "convnext_atto": 64,
    "mixnet_s": 64,
    "ghostnet_100": 64,
    "hrnet_w18_small": 64,
    "mobilevit_xxs": 64,
    "poolformer_s12": 64,
    "vit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "maxvit_rmlp_pico_rw_256": 256,
    "coatnet_pico_rw_224": 224,
    "xcit_nano_12_p16_224": 224,
    "levit_128s": 224,
    "torchvision/resnet18": 64,
    "torchvision/mobilenet_v3_large": 64,
    "torchvision/regnet_x_400mf": 64,
    "torchvision/efficientnet_b1": 64,
    "torchvision/convnext_tiny": 64,
    "torchvision/shufflenet_v2_x1_0": 64,
    "torchvision/googlenet": 64,
    "torchvision/swin_t": 64,
}


def update(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """All that a forward and backward pass leave, and the bytes that are alive between the two."""
    torch.manual_seed(1)
    device = SimulatedDevice(2**34)
    with device.work(None):
        loss = model.train()(images).square().sum()
        kept = device.usage().allocated
        loss.backward()
    found = {"loss": loss.detach(), "rng": torch.get_rng_state(), **dict(model.named_buffers())}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, kept


@pytest.mark.parametrize("name", SIZES)
def test_networks_are_the_same_at_every_depth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "SMALL", 0)
    torch.manual_seed(0)
    model = build_model(ModelConfig(name), 5)
    images, blocks = torch.randn(2, 3, SIZES[name], SIZES[name]), "|".join(blocks_of(model))
    assert blocks
    expected, most = update(copy.deepcopy(model), images)
    for plan in ("cheap", *(f"{depth}:{blocks}+cheap:rest" for depth in ("whole", "most", "least"))):
        recompute(model, NONE)
        saving = copy.deepcopy(model)
        recompute(saving, plan)
        found, kept = update(saving, images)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], plan
        assert kept < most + 4 * KiB, plan
