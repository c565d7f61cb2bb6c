"""The allocations of one training update and one evaluation batch, found without a GPU and without any memory.

The network, the optimizer and the update run on fake tensors: they have shapes but no data. Every storage that is born
or dies is written down in order; matrix products and convolutions leave a mark, since their workspace depends on
the card and is priced at replay (`predict`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from adaptive_trainer.data.position import Position
from adaptive_trainer.distributed.gradients import Gradients
from adaptive_trainer.distributed.peers import Peers
from adaptive_trainer.memory.allocator import MIN_BLOCK
from adaptive_trainer.models.loss_kinds import LossKind
from adaptive_trainer.models.losses import Criterion, Loss, Terms
from adaptive_trainer.models.memory_format import to_channels_last
from adaptive_trainer.models.recomputing.offloading import moves_noted
from adaptive_trainer.models.stepping import steps_alike
from adaptive_trainer.prediction.recorder import Kind, NotFollowed, Recorder, fake_device, materialize
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.program import Change, Program, is_classification
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.utils.random import same_random_numbers
from adaptive_trainer.utils.screen import unlogged

FAKE_TENSOR = "torch._subclasses.fake_tensor"  # logs 30 lines of an operator that refuses its shapes
CPU = torch.device("cpu")  # where fake tensors are, whatever they stand for
METERS = ("loss", "correct", "seen", "skipped")
TRACED_PARTS = 2  # the first micro-batch makes the gradients, the second adds to them, and so do all further ones


Watch = Callable[[nn.Module, Recorder], AbstractContextManager[Any]]


class TraceError(Exception):
    """The update cannot be traced; the message says why."""


@dataclass(frozen=True)
class TraceSpec:
    """One update, and one evaluation batch, of one network."""

    make_model: Callable[[], nn.Module]  # called under `torch.device("meta")`
    # Where it leaves `foreach` and `fused` open, PyTorch's choice is traced, which on CUDA is `foreach`.
    make_optimizer: Callable[[nn.Module], Optimizer]
    input_shape: tuple[int, ...]  # of one sample, such as (3, 224, 224)
    micro_batches: tuple[int, ...]  # samples in each forward and backward of the update, the largest first
    eval_batch_size: int | None = None  # None leaves evaluation out
    loss: Loss | Criterion = functional.cross_entropy
    precision: str = "fp32"
    channels_last: bool = False
    ema: bool = False
    clip_grad: bool = False
    # The copies that `step.undo` keeps on the device for a roll-back: of the buffers, and where a step of the
    # optimizer allocates, of weights, optimizer state and moving average.
    undo: bool = False
    cuda: bool = True  # else on the CPU, whose memory a simulated card counts
    # Height and width of stored images (`data.cache`). The whole batch is then on the card, and the next one waits
    # there as bytes; 0: the parts of a batch come one by one.
    stored_size: int = 0
    summed: bool = False  # over several ranks, in buffers of the gradients' size that stay
    same_kernels: bool = False  # no operator may take another kernel because there is no memory for its usual one
    key: Hashable = None  # names both makers and the loss: traces of equal keys serve each other; None: no other

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples behind each part of a trace: what no sample has a part in, the batch, micro-batches, evaluation."""
        return (0, sum(self.micro_batches), *self.micro_batches[:TRACED_PARTS], self.eval_batch_size or 0)

    @property
    def recipe(self) -> Recipe:
        """What the program of the update is told."""
        return Recipe(
            batch_size=sum(self.micro_batches),
            micro_batch_size=max(self.micro_batches),
            precision=self.precision,
            clip_grad=1.0 if self.clip_grad else None,
            channels_last=self.channels_last,
        )

    @property
    def signature(self) -> Hashable:
        """All but the sizes: traces of equal signatures have the same events."""
        flags = self.precision, self.channels_last, self.ema, self.clip_grad, self.undo, self.cuda, self.summed
        sizes = (self.input_shape[:-2], len(self.input_shape), len(self.batches), self.eval_batch_size is None)
        return (self.key, *sizes, *flags, self.stored_size)


@dataclass(frozen=True)
class Trace:
    """Events in order, in three stretches: making the network, one update, one evaluation batch.

    Each event is about an allocation or a mark, which are counted from 0 in order of birth.
    """

    kinds: bytes  # `Kind` of each event
    numbers: tuple[int, ...]  # what each event is about
    sizes: tuple[int, ...]  # bytes of each allocation or mark
    parts: bytes  # index into `batches`: the part of the update in which each was born
    batches: tuple[int, ...]  # samples in each part, as in `TraceSpec.batches`
    area: int  # pixels of an image
    update_start: int
    evaluation_start: int
    # Numbers of the copies that an allocating step needs, from the first to before the last. They are born where an
    # update would make them; the replay knows which updates do.
    copies: tuple[int, int] = (0, 0)

    @cached_property
    def most_alive(self) -> int:
        """Bytes that are alive at once in a later update: with less, none runs, however the memory is divided."""
        count, start = self.evaluation_start, self.update_start
        kinds, numbers = np.frombuffer(self.kinds, np.uint8, count), np.array(self.numbers[:count], np.int64)
        sizes = -(-np.array(self.sizes, np.int64) // MIN_BLOCK) * MIN_BLOCK
        sizes[slice(*self.copies)] = 0  # are made in some updates only
        is_born, is_died = kinds == Kind.BORN, kinds == Kind.DIED
        ends, stays, passes = np.zeros((3, len(sizes)), bool)
        ends[numbers[is_died]] = stays[numbers[is_born]] = passes[numbers[start:][is_born[start:]]] = True
        stays &= ~ends  # what an update leaves is there before the next one, and not born again
        changes = np.where(passes & ends, sizes, 0)[numbers] * (is_born.astype(np.int64) - is_died)
        return int(sizes[stays].sum() + changes[start:].cumsum().max(initial=0))

    def moved(self, micro_batches: int) -> int:
        """Bytes that an update of so many micro-batches offloads to the host, and fetches back."""
        marks = [number for kind, number in zip(self.kinds, self.numbers, strict=True) if kind == Kind.MOVED]
        last, further = len(self.batches) - 2, max(0, micro_batches - TRACED_PARTS)  # which are like the last traced
        return sum(self.sizes[number] * (1 + further * (self.parts[number] == last)) for number in marks)


def trace(spec: TraceSpec, watch: Watch | None = None) -> Trace:
    """Run the update of `spec` on fake tensors.

    Args:
        watch: is given the network and the recorder, and is entered while the update runs.

    Raises:
        TraceError: it cannot be run without data, or fails for another reason.
    """
    reason = ""
    for on_meta in (True, False):  # a few networks look at values while they are built: those are built for real
        try:
            with (
                no_collection(),
                unlogged(FAKE_TENSOR),
                same_random_numbers(),
                torch.autograd.set_detect_anomaly(False),
            ):
                return _trace(spec, watch or _unwatched, on_meta=on_meta)
        except NotFollowed as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    raise TraceError(reason)


def _unwatched(*_: Any) -> AbstractContextManager[Any]:
    return nullcontext()


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage in the block."""
    # A collection takes as long as a short trace, or as all of its replays, and would end lives at a moment that says
    # nothing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _trace(spec: TraceSpec, watch: Watch, *, on_meta: bool) -> Trace:
    with torch.device("meta" if on_meta else "cpu"):
        model = spec.make_model()
        if spec.channels_last:
            to_channels_last(model)
    recorder = Recorder(cuda=spec.cuda)
    with fake_device(cuda=spec.cuda), recorder, moves_noted(recorder.note_move):
        materialize(model)
        program = _Traced(spec, model.train(), recorder)
        update_start = len(recorder.kinds)
        with watch(model, recorder):
            program.update()
        evaluation_start = len(recorder.kinds)
        if spec.eval_batch_size:
            program.evaluate_batch(spec.eval_batch_size)
    return Trace(
        bytes(recorder.kinds),
        tuple(recorder.numbers),
        tuple(recorder.sizes),
        bytes(recorder.parts),
        spec.batches,
        area_of(spec.input_shape),
        update_start,
        evaluation_start,
        program.step_copies,
    )


class _Traced(Program):
    """The program of an update on tensors without data, in an order of births and deaths that is the real one's."""

    def __init__(self, spec: TraceSpec, model: nn.Module, recorder: Recorder) -> None:
        self.spec = spec
        self.recorder = recorder
        optimizer = spec.make_optimizer(model)
        for group in optimizer.param_groups if spec.cuda else ():
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True
        scaler = _Scaler("cpu", enabled=spec.precision == "fp16")
        criterion = Criterion.of(spec.loss)
        names = (*METERS, "weight") if criterion.kind is LossKind.WEIGHTED else METERS
        meters = {name: torch.zeros(()) for name in names}
        state = TrainState(model, optimizer, scaler, None, Position(0, 0, 0, 1), meters=meters)
        super().__init__(state, criterion, spec.recipe, CPU)
        self.foreach = spec.cuda or None  # on fake tensors, which are the CPU's, torch would not choose it
        self.average = [torch.empty_like(t) for t in model.state_dict().values()] if spec.ema else []
        buffers = [*model.buffers(), *(model.buffers() if spec.ema else ())]  # the average's are kept too
        self.copies = [torch.empty_like(t) for t in (*buffers, *meters.values())] if spec.undo else []
        self.step_copies = (0, 0)
        self.gradients = Gradients(self.parameters, Peers())
        if spec.summed:
            self.gradients.prepare()

    def update(self) -> None:
        """The whole update: the gradients are gone at its end, the optimizer's state stays."""
        self.recorder.part = 1
        total = sum(self.spec.micro_batches)
        is_whole = not self.spec.cuda or self.spec.stored_size > 0
        # Of a batch that is on the host only the number of its labels is asked for.
        images, labels = self._batch(total) if is_whole else (None, range(total))
        self.held: Any = images, labels, self._waiting(total)  # by who asks for the update, to its end
        gather = self._gather if self.spec.summed else None
        self.run(images, labels, guard=self._watch, gather=gather)  # type: ignore[arg-type]
        for parameter in self.parameters:
            parameter.grad = None
        if self.spec.undo and self.allocates:
            self._copy_before_step()

    def _split(self, images: Any, labels: Any) -> Iterator[Any]:
        """The parts that differ; where the batch is on the host, their sizes."""
        start = 0
        for part, samples in enumerate(self.spec.batches[2:-1], start=2):
            self.recorder.part = part
            yield (samples, samples) if images is None else (
                images[start : start + samples], labels[start : start + samples],
            )  # fmt: skip
            start += samples

    def _placed(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Parts of a batch that is there already take no memory of their own."""
        return (images, labels) if isinstance(images, Tensor) else self._batch(images)

    def _terms(self, output: Any, labels: Tensor) -> Terms:
        """Without a look at values, which there are none of."""
        with self._autocast():
            return self.criterion(output, labels)

    def _gather(self, weights: list[Tensor], samples: int, is_sum: bool) -> bool:
        """The gradients become views of the buffers, and are gone themselves."""
        self.gradients.settle([self.gradients.prepare()])
        self.gradients.collect(weights)
        self.gradients.hand_out()
        return True

    def clip(self) -> None:
        """From here on nothing depends on the samples."""
        self.recorder.part, self.recorder.in_step = 0, True
        super().clip()

    def _watch(self, change: Change) -> None:
        """Step, and see whether the step allocates."""
        born, self.before_step = len(self.recorder.sizes), len(self.recorder.kinds)
        change()
        self.allocates = not steps_alike(self.state.optimizer) or self.recorder.any_died_since(born)
        self.recorder.in_step = False

    def _copy_before_step(self) -> None:
        """The copies that an allocating step needs, which are made beside the gradients."""
        state = [t for t in tree_leaves(list(self.state.optimizer.state.values())) if isinstance(t, Tensor) and t.ndim]
        averaged = self.parameters if self.spec.ema else []
        changing = [*(p for p in self.parameters if p.requires_grad), *state, *averaged]
        end, first = len(self.recorder.kinds), len(self.recorder.sizes)
        self.copies += [torch.empty_like(t, requires_grad=False) for t in changing]
        self.step_copies = first, len(self.recorder.sizes)
        self.recorder.move_end(end, self.before_step)

    @torch.no_grad()
    def evaluate_batch(self, samples: int) -> None:
        """One batch through the network in evaluation mode."""
        if self.spec.stored_size:
            self.held = None, None, []
        self.recorder.part = len(self.spec.batches) - 1
        model = self.state.model.eval()
        x, y = self._batch(samples)
        waiting = self._waiting(samples)
        with self._autocast():
            output = model(x)
            with self.criterion.evaluating():
                self.criterion(output, y)
        if is_classification(output, y):
            (output.argmax(1) == y).sum()
        del waiting

    def _waiting(self, samples: int) -> list[Tensor]:
        """The next batch of stored images, as `gpu_transforms.DeviceBatch` holds it beside this one."""
        if not self.spec.cuda or not self.spec.stored_size:
            return []
        stored = torch.empty(samples, 3, self.spec.stored_size, self.spec.stored_size, dtype=torch.uint8)
        windows, labels = torch.empty(samples, 5), torch.empty(samples, dtype=torch.long)
        return [stored, windows, labels, torch.empty(32), torch.empty(3), torch.empty(3)]  # these crop and normalise

    def _batch(self, samples: int) -> tuple[Tensor, Tensor]:
        x = torch.empty(samples, *self.spec.input_shape)
        if self.spec.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, torch.empty(samples, dtype=torch.long)


class _Scaler(GradScaler):
    """Leaves no step out."""

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step always."""  # there are no values that could have overflowed
        return optimizer.step()


def area_of(input_shape: tuple[int, ...]) -> int:
    """Pixels of an image; 1 of a sample without sides."""
    return input_shape[-1] * input_shape[-2] if len(input_shape) > 1 else 1
