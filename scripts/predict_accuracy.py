"""Predicted against measured memory on a CUDA card: the ladder's rungs, and models that no rule was fitted on.

Usage: python scripts/predict_accuracy.py [--caps]

Each case trains for a few updates on an empty card (AMP, GradScaler, accumulation, a new batch for each micro-batch)
and its peak allocated and reserved bytes are noted; with --caps the smallest limit on the allocator under which the
update still runs is found by bisection too. Prints a line for each case and the median and worst errors.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from adaptive_trainer.memory.predict import Prediction, predict
from adaptive_trainer.memory.trace import Tracer, TraceSpec

MiB = 1 << 20
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
UPDATES = 4


@dataclass(frozen=True)
class Case:
    """One update of one network; `micro` 0 is no accumulation, `held_out` played no part in making the predictor."""

    model: str
    batch: int
    image: int
    precision: str = "fp32"
    micro: int = 0
    optimizer: str = "adamw"
    held_out: bool = False

    def make_model(self) -> nn.Module:
        import timm
        import torchvision

        name = self.model.removeprefix("torchvision/")
        network: nn.Module = (
            timm.create_model(name, num_classes=10)
            if name == self.model
            else torchvision.models.get_model(name, weights=None, num_classes=10)
        )
        return network

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        if self.optimizer == "sgd":
            return SGD(model.parameters(), lr=1e-3, momentum=0.9)
        return AdamW(model.parameters(), lr=1e-4, fused=True)

    @property
    def parts(self) -> tuple[int, ...]:
        micro = self.micro or self.batch
        return (micro,) * (self.batch // micro)

    def spec(self) -> TraceSpec:
        shape = (3, self.image, self.image)
        key = (self.model, self.optimizer)
        return TraceSpec(
            self.make_model, self.make_optimizer, shape, self.parts, loss=loss_of, precision=self.precision, key=key
        )

    def __str__(self) -> str:
        parts = f"{self.batch}" if not self.micro else f"{len(self.parts)}x{self.micro}"
        return f"{self.model} {parts}@{self.image} {self.precision} {self.optimizer}{' *' if self.held_out else ''}"


B0, LARGE, SMALL = "efficientnet_b0", "mobilenetv3_large_100", "mobilenetv3_small_100"
LADDERS = [
    Case(B0, 24, 224), Case(B0, 16, 224), Case(B0, 8, 224), Case(B0, 8, 192), Case(B0, 8, 160),
    Case(B0, 8, 160, "fp16"), Case(B0, 8, 160, "fp16", 4), Case(LARGE, 8, 160, "fp16", 4),
    Case(SMALL, 8, 160, "fp16", 4), Case(B0, 24, 224, "fp16"), Case(B0, 24, 224, "fp16", 12),
    Case(B0, 24, 224, "fp16", 8), Case(B0, 24, 224, "fp16", 4), Case(B0, 24, 224, "fp16", 2),
    Case("resnet50", 16, 224), Case("resnet50", 16, 224, "fp16"), Case("convnext_atto", 16, 224, "bf16"),
    Case("vit_tiny_patch16_224", 16, 224, "bf16"),
]  # fmt: skip
HELD_OUT = [
    Case(name, batch, 224, precision, 0, optimizer, True)
    for number, (name, batch) in enumerate(
        [
            ("torchvision/vgg11_bn", 8), ("torchvision/alexnet", 32), ("resnet18", 32), ("resnet101", 8),
            ("densenet121", 8), ("regnety_004", 24), ("mobilenetv2_100", 24), ("efficientnetv2_rw_t", 8),
            ("torchvision/shufflenet_v2_x1_0", 32), ("mixer_s32_224", 16), ("deit_small_patch16_224", 16),
            ("swin_tiny_patch4_window7_224", 8), ("convnext_tiny", 8), ("ghostnet_100", 24),
        ]
    )
    for precision, optimizer in (
        [("fp32", "adamw"), ("fp16", "sgd")] if number % 2 else [("bf16", "adamw"), ("fp32", "sgd")]
    )
]  # fmt: skip


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target)


def train(case: Case, updates: int) -> None:
    model = case.make_model().cuda()
    optimizer = case.make_optimizer(model)
    scaler = GradScaler("cuda", enabled=case.precision == "fp16")
    for _ in range(updates):
        for part in case.parts:
            x = torch.randn(part, 3, case.image, case.image).cuda()
            y = torch.zeros(part, dtype=torch.long).cuda()
            with torch.autocast("cuda", AUTOCAST.get(case.precision), enabled=case.precision in AUTOCAST):
                output = model(x)
                loss = loss_of(output, y)
            scaler.scale(loss / len(case.parts)).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


def empty_card() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(case: Case) -> tuple[int, int]:
    empty_card()
    train(case, UPDATES)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def fits(case: Case, limit: int) -> bool:
    empty_card()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((limit + 0.5) / total)
    try:
        train(case, UPDATES - 1)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def smallest_limit(case: Case, guess: int) -> int:
    """By bisection to 1 % of the guess."""
    low, high, step = int(guess * 0.75), int(guess * 1.25), max(2 * MiB, guess // 100)
    while high - low > step:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(case, middle) else (middle, high)
    return high


def percent(predicted: int | None, measured: int) -> float:
    return 100 * (predicted or 0) / measured - 100


def summary(name: str, errors: list[float]) -> None:
    sizes = [abs(error) for error in errors]
    if sizes:
        print(f"{name}: median {statistics.median(sizes):.2f} %, worst {max(sizes):.2f} %, of {len(sizes)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--caps", action="store_true", help="bisect for the smallest limit too")
    caps_too = parser.parse_args().caps
    about = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    print(f"{about.name}, torch {torch.__version__}, cuDNN {cudnn}; * held out; MiB")
    tracer, errors = Tracer(), dict[str, list[float]]()
    for case in [*LADDERS, *HELD_OUT]:
        found = predict(case.spec(), capability=(about.major, about.minor), tracer=tracer)
        line = report(case, found, caps_too, errors)
        print(line, flush=True)
    for name, values in errors.items():
        summary(name, values)


def report(case: Case, found: Prediction, caps_too: bool, errors: dict[str, list[float]]) -> str:
    if found.reason:
        return f"{case}: unknown, {found.reason}"
    peaks = measure(case)
    pairs = [("allocated", found.allocated_bytes, peaks[0]), ("reserved", found.reserved_bytes, peaks[1])]
    if caps_too:
        limit = smallest_limit(case, found.min_capacity_bytes or 0)
        pairs.append(("smallest limit", found.min_capacity_bytes, limit))
    group = "held out" if case.held_out else "ladders"
    for name, predicted, measured in pairs:
        errors.setdefault(f"{group}, {name}", []).append(percent(predicted, measured))
    shown = [f"{n} {(p or 0) / MiB:.0f} of {m / MiB:.0f} ({percent(p, m):+.1f} %)" for n, p, m in pairs]
    return f"{case}: {', '.join(shown)}"


if __name__ == "__main__":
    main()
