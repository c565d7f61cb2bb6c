"""Parts of a batch give what the whole batch gives, whatever the denominator of the loss's mean is."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.utils.data import TensorDataset

from adaptive_trainer import Trainer, compose_config, predict
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.losses import Criterion, CrossEntropy, Loss, balanced
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.step.update import Update
from adaptive_trainer.utils.random import RandomStates
from tests.support.runs import CPU, METERS

CLASSES = 4
Make = Callable[[Tensor], Loss]  # from weights (CLASSES,)


class Wrapped(nn.Module):
    """A loss of somebody's own around another."""

    def __init__(self, inner: Loss) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, output: Tensor, labels: Tensor) -> Any:
        return self.inner(output, labels)


class Weighed(nn.CrossEntropyLoss):
    """A subclass that adds nothing."""


class Own(nn.CrossEntropyLoss):
    """A subclass that has a forward of its own."""

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return super().forward(output, labels)


def one_hot(loss: Loss) -> Loss:
    return Wrapped(lambda output, labels: loss(output, functional.one_hot(labels, CLASSES).to(output.dtype)))


def pair(weights: Tensor) -> Loss:
    def loss(output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        each = functional.cross_entropy(output, labels, weight=weights, reduction="none")
        return each.sum(), weights[labels].sum()

    return loss


def smooth_pair(weights: Tensor) -> Loss:
    """Its denominator depends on the output."""

    def loss(output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sure = output.detach().softmax(1).gather(1, labels[:, None])[:, 0]
        return (functional.cross_entropy(output, labels, reduction="none") * sure).sum(), sure.sum()

    return loss


LOSSES: dict[str, Make] = {
    "cross entropy": lambda w: nn.CrossEntropyLoss(w),
    "ignoring": lambda w: nn.CrossEntropyLoss(ignore_index=1),
    "ignoring, weighted, smooth": lambda w: nn.CrossEntropyLoss(w, ignore_index=1, label_smoothing=0.1),
    "ignoring -100": lambda w: nn.CrossEntropyLoss(),
    "subclass": lambda w: Weighed(w, ignore_index=2),
    "our own": lambda w: CrossEntropy(CLASSES, 0.1, w),
    "our own, plain": lambda w: CrossEntropy(CLASSES, 0.1),
    "likelihood": lambda w: Wrapped(lambda o, y: nn.NLLLoss(w)(o.log_softmax(1), y)),
    "own forward": lambda w: Own(w, label_smoothing=0.1),
    "lambda": lambda w: lambda output, labels: functional.cross_entropy(output, labels, weight=w, ignore_index=3),
    "module around it": lambda w: Wrapped(nn.CrossEntropyLoss(w, ignore_index=0)),
    "function": lambda w: functional.cross_entropy,
    "plain lambda": lambda w: lambda output, labels: functional.cross_entropy(output, labels, label_smoothing=0.2),
    "sum": lambda w: nn.CrossEntropyLoss(w, reduction="sum"),
    "sum of a lambda": lambda w: lambda output, labels: functional.cross_entropy(output, labels, reduction="sum"),
    "multi margin": lambda w: nn.MultiMarginLoss(weight=w),
    "binary": lambda w: one_hot(nn.BCEWithLogitsLoss(pos_weight=w)),
    "squares": lambda w: one_hot(nn.MSELoss()),
    "summed squares": lambda w: one_hot(nn.MSELoss(reduction="sum")),
    "pair": pair,
    "pair of the output": smooth_pair,
}


FOUND_OUT = ("likelihood", "own forward", "lambda", "module around it")


class Run:
    """Updates of a small network in double precision, with one loss."""

    def __init__(self, loss: Loss, capacity: Capacity, micro_batch_size: int, clip_grad: float | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
        self.state = TrainState(
            self.model,
            torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            GradScaler("cpu", enabled=False),
            None,
            Position(0, 0, 0, 10_000),
            meters={name: torch.zeros((), dtype=torch.float64) for name in METERS},
        )
        self.update = Update(
            self.state, loss, Recipe(batch_size=9, micro_batch_size=micro_batch_size, clip_grad=clip_grad),
            device=CPU, capacity=capacity,
        )  # fmt: skip

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def labels_of(name: str, labels: list[int]) -> Tensor:
    found = torch.tensor(labels)
    return torch.where(found == 1, -100, found) if name == "ignoring -100" else found


@pytest.mark.long
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=9),
    weights=st.lists(st.sampled_from([0.0, 0.3, 1.0, 7.5]), min_size=CLASSES, max_size=CLASSES),
    micro=st.integers(1, 4),
)
@example(labels=[1, 1, 0, 2, 2, 3, 0], weights=[1.0, 0.5, 2.0, 4.0], micro=2)
@example(labels=[1, 1, 1], weights=[1.0, 0.0, 2.0, 4.0], micro=1)
@example(labels=[3, 3, 0, 0], weights=[1.0, 0.3, 2.0, 0.0], micro=2)
def test_an_update_in_parts_is_the_update(
    name: str, capacity: Capacity, labels: list[int], weights: list[float], micro: int
) -> None:
    if name in FOUND_OUT:  # smoothing at a class that weighs nothing is no weighted mean; nor is one of no class
        weights = [max(weight, 0.3) for weight in weights]
    w, y = torch.tensor(weights, dtype=torch.float64), labels_of(name, labels)
    images = torch.randn(len(y), 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, parts = (Run(LOSSES[name](w), capacity, size, clip_grad=1.0) for size in (len(y), micro))
    for run in (whole, parts):
        for _ in range(3):
            run.update.run(images, y, samples=0)
    assert whole.weights().isfinite().all()
    torch.testing.assert_close(parts.weights(), whole.weights(), rtol=1e-9, atol=1e-12)
    for meter in (*METERS, *(["weight"] if "weight" in whole.state.meters else [])):
        torch.testing.assert_close(parts.state.meters[meter], whole.state.meters[meter], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=9),
    weights=st.lists(st.sampled_from([0.3, 1.0, 7.5]), min_size=CLASSES, max_size=CLASSES),
    sizes=st.lists(st.integers(1, 9), min_size=9, max_size=9),
)
def test_the_loss_of_an_evaluation_is_that_of_the_whole(
    name: str, capacity: Capacity, labels: list[int], weights: list[float], sizes: list[int]
) -> None:
    w, y = torch.tensor(weights, dtype=torch.float64), labels_of(name, labels)
    images = torch.randn(len(y), 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = Run(LOSSES[name](w), capacity, len(y))

    def evaluated(sizes: list[int]) -> tuple[float, float]:
        parts = zip(torch.split(images, sizes), torch.split(y, sizes), strict=True)
        sums = [run.update.evaluate(run.model, *part) for part in parts]
        return sum(loss for loss, _, _ in sums), sum(weight for _, weight, _ in sums)

    pieces = [size for size in sizes if size][: len(y)]
    while sum(pieces) > len(y):
        pieces.pop()
    pieces += [1] * (len(y) - sum(pieces))
    whole = evaluated([len(y)])
    assert evaluated(pieces) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    if name in ("our own", "our own, plain"):
        plain = functional.cross_entropy(run.model(images), y)
        assert whole[0] / whole[1] == pytest.approx(float(plain.detach())), "no weights, no smoothing"


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("name", ["ignoring, weighted, smooth", "pair", "lambda"])
def test_parts_with_a_scaled_loss(name: str, overflows: bool, capacity: Capacity) -> None:
    """In half precision the scale of the loss must not change what is learned, and an overflow is left out."""
    runs = []
    for micro in (8, 3):
        run = Run(LOSSES[name](torch.tensor([0.5, 1.0, 2.0, 4.0])), capacity, micro)
        run.model.float()
        run.state.scaler = run.update.state.scaler = GradScaler("cpu", init_scale=2.0**10)
        images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
        run.update.run(images * (float("inf") if overflows else 1), torch.arange(8) % CLASSES, samples=0)
        assert float(run.state.meters["skipped"]) == overflows
        runs.append(run.weights())
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


class Coupled(nn.Module):
    """Contrasts each sample with the others: no mean of its parts."""

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return (output @ output.T - labels[:, None].eq(labels).to(output.dtype)).square().mean()


def clamped(output: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """A weighted mean; of a class that does not count it is 0, not 0 / 0."""
    counts = weights[labels]
    return (functional.cross_entropy(output, labels, reduction="none") * counts).sum() / counts.sum().clamp_min(1e-8)


@pytest.mark.parametrize(
    ("loss", "kind", "said"),
    [
        (nn.CrossEntropyLoss(torch.ones(CLASSES)), "weighted", ""),
        (CrossEntropy(CLASSES), "mean", ""),
        (nn.MSELoss(reduction="sum"), "sum", "sum over samples"),
        (lambda o, y: functional.cross_entropy(o, y), "mean", ""),
        (lambda o, y: functional.multi_margin_loss(o, y, reduction="sum"), "sum", "sum over samples"),
        (lambda o, y: functional.cross_entropy(o, y, weight=torch.arange(1.0, 5.0)), "weighted", "weighted by class"),
        (lambda o, y: clamped(o, y, torch.arange(4.0)), "weighted", "weighted by class"),
        (lambda o, y: clamped(o, y, torch.tensor([0.0, 0.0, 0.0, 2.0])), "weighted", "weighted by class"),
        (
            lambda o, y: functional.cross_entropy(o, y, weight=torch.arange(4.0), label_smoothing=0.1),
            "other",
            "neither",
        ),
        (Coupled(), "other", "neither a mean over samples nor a sum"),
        (lambda o, y: functional.cross_entropy(o, y) + torch.rand(()), "other", "neither"),
        (pair(torch.ones(CLASSES)), "weighted", ""),
    ],
)
def test_what_kind_of_loss_it_is(loss: Loss, kind: str, said: str) -> None:
    criterion = Criterion(loss)
    before = torch.get_rng_state()
    criterion.learn(torch.randn(6, CLASSES, generator=torch.Generator()), torch.arange(6) % CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    assert criterion.kind == kind
    assert said in criterion.note if said else criterion.note == ""


@pytest.mark.parametrize(("reduction", "kind"), [("mean", "mean"), ("sum", "sum")])
def test_the_kind_of_a_loss_of_several_outputs(reduction: str, kind: str) -> None:
    def loss(output: Any, labels: Tensor) -> Any:
        first, rest = output
        return sum(functional.cross_entropy(o, labels, reduction=reduction) for o in (first, rest["more"]))

    criterion = Criterion(loss)
    criterion.learn((torch.randn(5, 3), {"more": torch.randn(5, 3)}), torch.arange(5) % 3)
    assert criterion.kind == kind


def test_finding_out_changes_nothing_in_a_loss() -> None:
    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.calls = 0

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            self.count += 1
            self.calls += 1
            return functional.cross_entropy(output, labels)

    loss = Counting()
    criterion = Criterion(loss)
    criterion.learn(torch.randn(6, CLASSES), torch.arange(6) % CLASSES)
    assert (criterion.kind, loss.calls, float(loss.count)) == ("mean", 0, 0.0)


# -- trainer.class_weights


def uneven() -> TensorDataset:
    labels = torch.tensor([0] * 14 + [1] * 7 + [2] * 3)
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + labels[:, None, None, None] / 10
    return TensorDataset(images, labels)


def flat(_: Any, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


def fit(folder: Path, *overrides: str, loss: Loss | None = None) -> Trainer:
    options = [
        "data.image_size=8", "data.transforms=none", "data.num_workers=0", "trainer.batch_size=8", "optimizer=sgd",
        "trainer.epochs=2", "memory.limit=none", "ladder=none", *overrides,
    ]  # fmt: skip
    trainer = Trainer(
        compose_config(options), model=flat, train_data=uneven(), val_data=uneven(), loss=loss, output_dir=folder
    )
    trainer.fit()
    return trainer


def trained(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    assert balanced(labels, 3) == pytest.approx(list(expected))
    assert balanced(labels, 5) == pytest.approx([*expected, 1.0, 1.0])


@pytest.mark.long
@pytest.mark.parametrize("weights", ["balanced", "[0.5,2,0]"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_do_not_depend_on_micro_batches_or_on_the_evaluation_batch(
    weights: str, smoothing: float, tmp_path: Path
) -> None:
    asked = [f"trainer.class_weights={weights}", f"trainer.label_smoothing={smoothing}"]
    whole = fit(tmp_path / "whole", *asked)
    parts = fit(tmp_path / "parts", *asked, "trainer.micro_batch_size=3", "trainer.eval_batch_size=5")
    plain = fit(tmp_path / "plain")
    for name, weight in parts.model.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(weight, whole.model.state_dict()[name], rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
        assert not torch.allclose(weight, plain.model.state_dict()[name], rtol=1e-3)  # type: ignore[union-attr]
    results = [trained(tmp_path / name) for name in ("whole", "parts")]
    for key in ("train_loss", "val_loss"):
        assert results[0]["metrics"][key] == pytest.approx(results[1]["metrics"][key], rel=1e-5)
    assert ("by the training labels the classes weigh 0.571, 1.14, 2.67" in str(results)) is (weights == "balanced")
    images, labels = uneven().tensors
    expected = functional.cross_entropy(whole.model(images), labels).detach()  # type: ignore[misc]
    assert results[0]["metrics"]["val_loss"] == pytest.approx(float(expected), rel=1e-5), "the plain one"


def test_a_loss_of_the_callers_own_is_told_apart(tmp_path: Path) -> None:
    weight = torch.tensor([0.5, 1.0, 4.0])

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(output, labels, weight=weight)

    runs = [fit(tmp_path / micro, f"trainer.micro_batch_size={micro}", loss=loss) for micro in ("8", "3")]
    for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    events = trained(tmp_path / "3")["events"]
    assert sum("a mean weighted by class" in event for event in events) == 1
    fit(tmp_path / "other", "trainer.class_weights=balanced", "optimizer.lr=1e-5", loss=Coupled())
    events = trained(tmp_path / "other")["events"]
    assert sum("neither a mean over samples nor a sum" in event for event in events) == 1
    assert any(event.startswith("trainer.class_weights is not used") for event in events)


@pytest.mark.long
def test_a_run_with_class_weights_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    asked = ("trainer.class_weights=balanced", "trainer.micro_batch_size=3", "schedule=constant")
    whole = fit(tmp_path / "whole", *asked)
    fit(tmp_path / "first", *asked, "trainer.epochs=1")
    again = fit(tmp_path / "again", *asked, f"resume={tmp_path / 'first' / 'checkpoints' / 'last.pt'}")
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(ours, theirs)
    assert trained(tmp_path / "again")["metrics"]["train_loss"] == trained(tmp_path / "whole")["metrics"]["train_loss"]


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("null", "balanced"), ("balanced", "null")])
def test_a_run_goes_on_with_other_class_weights(before: str, after: str, tmp_path: Path) -> None:
    fit(tmp_path / "first", f"trainer.class_weights={before}", "trainer.epochs=1")
    last = tmp_path / "first" / "checkpoints" / "last.pt"
    fit(tmp_path / "more", f"trainer.class_weights={after}", f"resume={last}")
    assert "resumed with another trainer.class_weights" in str(trained(tmp_path / "more")["events"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[1,2]", "trainer.class_weights has 2 numbers and there are 3 classes"),
        ("[0,0,0]", "none of what is allowed"),
        ("[1,2,-1]", "none of what is allowed"),
        ("[1,2,nan]", "none of what is allowed"),
        ("[1,2,x]", "none of what is allowed"),
        ("fair", "trainer.class_weights=fair is none of what is allowed: null, balanced, or a list"),
        ("2", "none of what is allowed"),
    ],
)
def test_class_weights_that_cannot_be(weights: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit(tmp_path, f"trainer.class_weights={weights}")


@pytest.mark.parametrize("asked", ["balanced", "[1,2,3]"])
def test_class_weights_are_planned(asked: str) -> None:
    options = ["model.name=test_resnet", "data.image_size=32", "trainer.micro_batch_size=8"]
    plain, weighed = (
        predict(compose_config([*options, *more]), device="cpu") for more in ([], [f"trainer.class_weights={asked}"])
    )
    assert weighed.reason == ""
    assert plain.allocated_bytes is not None
    assert weighed.allocated_bytes == pytest.approx(plain.allocated_bytes, rel=0.01)


# -- what finding out may touch, and what becomes of a loss in evaluation


def class_weighted(weight: Tensor, *, one_number: bool = False) -> Loss:
    """A mean weighted by class, of scores or of one number that decides between two classes."""

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        target = labels[:, None].to(output.dtype)
        each = functional.binary_cross_entropy_with_logits(output, target, reduction="none")[:, 0]
        if not one_number:
            each = functional.cross_entropy(output, labels, reduction="none")
        return (each * weight[labels]).sum() / weight[labels].sum()

    return loss


@pytest.mark.parametrize(("width", "classes"), [(1, 2), (7, 3), (3, 7)])
def test_made_up_labels_are_classes(width: int, classes: int) -> None:
    """On a CUDA device a label that a loss does not know ends the process."""
    weight, seen = torch.arange(1.0, classes + 1), set[int]()
    inner = nn.Linear(width, classes, bias=False).requires_grad_(False)  # where scores are not as many as classes

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        seen.update(labels.tolist())
        scores = inner(output.float()).to(output.dtype)
        return functional.cross_entropy(scores, labels, weight=weight.to(output.dtype))

    criterion = Criterion(loss, classes)
    criterion.learn(torch.randn(6, width), torch.zeros(6, dtype=torch.long))
    assert seen == set(range(classes))
    assert criterion.kind == "weighted"
    labels = torch.tensor([classes - 1, 0])
    terms = criterion(torch.randn(2, width), labels)
    assert terms.weight is not None
    assert float(terms.weight) == pytest.approx(float(weight[labels].sum()), rel=1e-3)


def test_one_number_that_decides_between_two_classes() -> None:
    criterion = Criterion(class_weighted(torch.tensor([1.0, 5.0]), one_number=True), 2)
    criterion.learn(torch.randn(4, 1), torch.tensor([0, 0, 1, 0]))
    assert criterion.kind == "weighted"


class Frozen(nn.Module):
    """Has a part that is kept in evaluation mode, and weighs classes in training alone."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.BatchNorm1d(CLASSES, affine=False).double().eval()
        self.register_buffer("weight", torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        weight = self.weight.to(output.dtype) if self.training else None
        loss: Tensor = functional.cross_entropy(output, labels, weight=weight)
        self.features(output.detach().double())
        return loss


def test_a_part_of_a_loss_that_is_kept_in_evaluation_mode_stays_in_it(capacity: Capacity) -> None:
    loss = Frozen()
    run = Run(loss, capacity, 8)
    images, labels = torch.randn(8, 3, 2, 2, dtype=torch.float64), torch.arange(8) % CLASSES
    for _ in range(2):
        run.update.evaluate(run.model, images, labels)
        run.update.run(images, labels, samples=0)
    assert loss.training
    assert not loss.features.training
    assert not loss.features.get_buffer("running_mean").any()


def test_a_loss_may_be_of_another_kind_in_evaluation(capacity: Capacity) -> None:
    run = Run(Frozen(), capacity, 8)
    images, labels = torch.randn(8, 3, 2, 2, dtype=torch.float64), torch.arange(8) % CLASSES
    run.update.run(images, labels, samples=0)
    parts = [run.update.evaluate(run.model, images[part], labels[part]) for part in (slice(0, 3), slice(3, 8))]
    found = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    plain = functional.cross_entropy(run.model(images).detach(), labels)
    assert found == pytest.approx(float(plain), rel=1e-6)


class Drawing:
    """Draws from every generator there is."""

    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(1), random.Random(2), np.random.default_rng(3)

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        torch_own, python_own, numpy_own = self.own
        drawn = random.random() + np.random.rand() + python_own.random() + numpy_own.random()
        return functional.cross_entropy(output, labels) * (1 + drawn + float(torch.rand((), generator=torch_own)))


def test_finding_out_draws_nothing() -> None:
    loss = Drawing()
    states = RandomStates(CPU).read(loss.own)
    Criterion(loss).learn(torch.randn(6, CLASSES, generator=torch.Generator()), torch.arange(6) % CLASSES)
    assert str(RandomStates(CPU).read(loss.own)) == str(states)


def test_a_loss_that_cannot_be_copied_is_of_no_known_kind() -> None:
    loss = Wrapped(functional.cross_entropy)
    loss.lock = threading.Lock()  # type: ignore[assignment]
    criterion = Criterion(loss)
    criterion.learn(torch.randn(6, CLASSES), torch.arange(6) % CLASSES)
    assert criterion.kind == "other"


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("null", "[1,2,3]"), ("[3,2,1]", "null"), ("[3,2,1]", "[1,2,3]")])
def test_class_weights_are_a_setting_and_no_state(before: str, after: str, tmp_path: Path) -> None:
    fit(tmp_path / "first", f"trainer.class_weights={before}", "trainer.epochs=1")
    last = tmp_path / "first" / "checkpoints" / "last.pt"
    run = fit(tmp_path / "more", f"trainer.class_weights={after}", f"resume={last}", "schedule=constant")
    content = torch.load(last, weights_only=True)
    content["loss_buffers"] = {}
    torch.save(content, last)
    plain = fit(tmp_path / "plain", f"trainer.class_weights={after}", f"resume={last}", "schedule=constant")
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(ours, theirs)
