"""Networks by name, image sizes they refuse, and recomputation that leaves no trace."""

from __future__ import annotations

import copy
import functools
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.errors import ModelError
from adaptive_trainer.memory.simulated import SimulatedDevice
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.models.recomputing import keeper
from adaptive_trainer.models.recomputing.plan import blocks_of
from adaptive_trainer.models.savers.offload import apply as offload
from adaptive_trainer.models.savers.recompute import apply as recompute
from adaptive_trainer.models.zoo import NEED_INPUT, build_model
from adaptive_trainer.planning import image_size
from adaptive_trainer.planning.image_size import check_image_size


class Block(nn.Module):
    """A residual block with what recomputation gets wrong: statistics, dropout, a counter outside the state_dict."""

    seen: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.BatchNorm2d(width, momentum=None)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out: Tensor = x + self.drop(nn.functional.silu(self.norm(self.conv(x))))
        return out


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(Block(), Block()), Block(), nn.Flatten(), nn.LazyLinear(5)
    )  # fmt: skip


def bytes_kept(model: nn.Module, images: Tensor) -> int:
    """Bytes of tensors that a forward pass leaves for the backward pass."""
    model.train()
    torch.manual_seed(1)
    device = SimulatedDevice(2**34)
    with device.work(None):
        loss = model(images).square().sum()
        kept = device.usage().allocated
        loss.backward()
    return kept - sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def facts(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**dict(model.named_buffers()), **gradients, "rng": torch.get_rng_state()}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "network":
        model = network()
        model(torch.zeros(2, 3, 64, 64))
        return model
    return build_model(ModelConfig(name), 5)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute what is small as well, as these images are."""
    monkeypatch.setattr(keeper, "SMALL", 0)


@pytest.mark.long
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("value", "offloads"),
    [
        *(("cheap", False), ("blocks", False), ("most:{blocks}+cheap:rest", False)),
        *(("none", True), ("cheap", True), ("blocks", True)),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_efficientnet",
        "test_vit",
        "torchvision/resnet18",
        "torchvision/mobilenet_v3_small",
        "network",
    ],
)
def test_recomputing_and_offloading_change_nothing_but_memory(name: str, value: str, offloads: bool) -> None:
    plain = make(name)
    saving = copy.deepcopy(plain)
    recompute(saving, value.format(blocks="|".join(blocks_of(plain))))
    offload(saving, offloads)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected_bytes, expected = bytes_kept(plain, images), facts(plain)
    assert bytes_kept(saving, images) < 0.85 * expected_bytes
    found = facts(saving)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert plain.state_dict().keys() == saving.state_dict().keys()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["test_resnet", "network"])
def test_recomputing_can_be_turned_off_and_on(name: str) -> None:
    model = make(name)
    images = torch.randn(4, 3, 64, 64)
    plain = bytes_kept(model, images)
    for enable in (True, True, False, True, False):
        recompute(model, "blocks" if enable else "none")
        assert (bytes_kept(model, images) < plain) == enable


@pytest.mark.parametrize("is_method", [True, False])
def test_a_forward_that_a_block_alone_was_given_stays_its_own(is_method: bool) -> None:
    model, images = make("network"), torch.randn(2, 3, 64, 64)
    block = next(module for module in model.modules() if isinstance(module, Block))

    def doubled(self: Block, x: Tensor) -> Tensor:
        return 2 * Block.forward(self, x)

    own = types.MethodType(doubled, block) if is_method else functools.partial(doubled, block)
    block.__dict__["forward"] = own
    model.eval()
    expected = model(images)
    for enable in (False, True, True, False):
        recompute(model, "blocks" if enable else "none")
        assert torch.equal(model(images), expected)
        assert torch.equal(copy.deepcopy(model)(images), expected)
    assert block.__dict__["forward"] is own


def test_copy_of_a_recomputing_network_uses_its_own_weights() -> None:
    model = make("network")
    recompute(model, "blocks")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(torch.randn(2, 3, 64, 64)).abs().sum() > 0


class FailsInBackward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs out of memory where a norm is computed again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default:
            raise torch.OutOfMemoryError("made up")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("small")
def test_failure_while_recomputing_leaves_the_buffers_as_they_are() -> None:
    model = make("network")
    recompute(model, "blocks")
    loss = model(torch.randn(4, 3, 64, 64)).sum()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with pytest.raises(torch.OutOfMemoryError), FailsInBackward():  # type: ignore[no-untyped-call]
        loss.backward()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0], name
        assert torch.equal(buffer, buffers[name][1]), name


@pytest.mark.long
def test_network_without_blocks_says_that_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    recompute(build_model(ModelConfig("torchvision/vgg11"), 2), "blocks")
    assert "has no blocks to recompute" in caplog.text


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/squeezenet1_0", "torchvision/googlenet"])
def test_head_has_the_classes(name: str) -> None:
    model = build_model(ModelConfig(name), 7).train()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_kwargs_reach_the_model() -> None:
    model = build_model(ModelConfig("test_vit", kwargs={"drop_rate": 0.5}), 3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p] == [0.5]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("efficientnet_bo"), "unknown model.name=efficientnet_bo: did you mean efficientnet_b"),
        (ModelConfig("torchvision/mobilenet_v3"), "did you mean torchvision/mobilenet_v"),
        (ModelConfig("zzz"), "there are .* such as"),
        (ModelConfig("test_vit", kwargs={"depht": 3}), "test_vit does not take model.kwargs=.*depht"),
        (ModelConfig("torchvision/resnet18", kwargs={"depht": 3}), "torchvision/resnet18 does not take model.kwargs"),
        (ModelConfig("local-dir:/nowhere"), "cannot read model.name=local-dir:/nowhere"),
    ],
)
def test_what_cannot_be_built_is_explained(config: ModelConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(config, 3)


def test_errors_of_the_model_itself_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> nn.Module:
        raise TypeError("a bug")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_resnet", broken)
    with pytest.raises(TypeError, match="a bug"):
        build_model(ModelConfig("test_resnet"), 3)


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/mobilenet_v3_small"])
def test_pretrained_without_network_is_explained(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(ModelError, match=f"pretrained weights of {name}.*Use model.pretrained=false"):
        build_model(ModelConfig(name, pretrained=True), 3)


def test_pretrained_weights_of_torchvision_are_kept_under_another_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    learned = torchvision.models.mobilenet_v3_small()
    url: str = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(learned.state_dict(), folder / url.rpartition("/")[2])
    model = build_model(ModelConfig("torchvision/mobilenet_v3_small", pretrained=True), 5)
    found, expected = model.state_dict(), learned.state_dict()
    other = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert other == ["classifier.3.weight", "classifier.3.bias"]
    assert found["classifier.3.weight"].shape[0] == 5


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_tiny_patch16_224", 192, "refuses data.image_size=192: .*224.*Use data.image_size=224"),
        ("convnext_tiny", 16, "convnext_tiny refuses data.image_size=16"),
        ("torchvision/vit_b_16", 160, "refuses data.image_size=160"),
    ],
)
def test_refused_image_sizes(name: str, size: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_image_size(ModelConfig(name), size, 10)


def test_images_have_three_channels() -> None:
    with pytest.raises(ModelError, match=r"model.kwargs.in_chans=1: images have 3 channels"):
        check_image_size(ModelConfig("test_efficientnet", kwargs={"in_chans": 1}), 160, 10)


def test_image_sizes_that_are_taken_leave_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    check_image_size(ModelConfig("test_efficientnet"), 160, 10)
    check_image_size(ModelConfig("vit_tiny_patch16_224", kwargs={"img_size": 192}), 192, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_an_earlier_process_has_seen_to_be_taken_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[int] = []

    def failure(model: nn.Module, size: int) -> str:
        tried.append(size)
        return "it is too small" if size < 64 else ""

    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path))
    monkeypatch.setattr(image_size, "failure_at", failure)
    for _ in range(2):
        image_size._failure.cache_clear()  # as in a new process
        check_image_size(ModelConfig("test_efficientnet"), 96, 10)
        with pytest.raises(ModelError, match="too small"):
            check_image_size(ModelConfig("test_efficientnet"), 48, 10)
    assert tried.count(96) == 1
    assert tried.count(48) == 2
    image_size._failure.cache_clear()


def test_has_batch_norm() -> None:
    assert has_batch_norm(build_model(ModelConfig("test_efficientnet"), 2))
    assert not has_batch_norm(build_model(ModelConfig("test_vit"), 2))


class Counted(TorchDispatchMode):
    """Counts the copies that operators make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", NEED_INPUT, ids=lambda kind: kind.__name__)
def test_these_activations_copy_their_input_to_work_in_place(kind: Any) -> None:
    for inplace in (True, False):
        with Counted() as counted:
            kind(inplace=inplace)(torch.ones(2, requires_grad=True) + 1)
        assert counted.copies == inplace


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "torchvision/mobilenet_v3_small"])
def test_no_activation_is_copied_and_no_bit_is_another(name: str) -> None:
    torch.manual_seed(0)
    mine = build_model(ModelConfig(name=name), 10)
    torch.manual_seed(0)
    theirs = (
        torchvision.models.get_model(name.removeprefix("torchvision/"), num_classes=10)
        if name.startswith("torchvision/")
        else timm.create_model(name, num_classes=10)
    )
    images, found = torch.rand(2, 3, 64, 64), []
    for model, copies in ((mine, False), (theirs, True)):
        torch.manual_seed(1)
        with Counted() as counted:
            model(images).square().sum().backward()
        assert (counted.copies > 0) == copies
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, other in zip(*found, strict=True):
        assert torch.equal(ours, other)
