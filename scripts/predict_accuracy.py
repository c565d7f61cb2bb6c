"""Predicted against measured memory on a CUDA card: every rung of both ladders, and models that no rule was fitted on.

Usage: python scripts/predict_accuracy.py [--workers N] [--out FOLDER]

Each recipe is predicted, run dry on the card as training does it, and again under limits around the predicted
smallest one, until the smallest that holds is found. Prints a line for each recipe, then medians and worst errors.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from adaptive_trainer import compose_config
from adaptive_trainer.config.schema import Config, MemoryConfig
from adaptive_trainer.ladder.resolve import recipe, resolve
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.prediction.estimator import Prediction, verdict
from adaptive_trainer.training.measure import measure

MiB = 1 << 20
STEP = 0.005  # of the predicted limit, and at least one segment of the allocator
MOST_STEPS = 25
QUANTITIES = ("allocated", "reserved", "smallest limit")

LOOKED_AT = (
    ("resnet50", 16), ("convnext_atto", 16), ("vit_tiny_patch16_224", 16),
    ("torchvision/vgg11_bn", 8), ("torchvision/alexnet", 32), ("resnet18", 32), ("resnet101", 8),
    ("densenet121", 8), ("regnety_004", 24), ("mobilenetv2_100", 24), ("efficientnetv2_rw_t", 8),
    ("torchvision/shufflenet_v2_x1_0", 32), ("mixer_s32_224", 16), ("deit_small_patch16_224", 16),
    ("swin_tiny_patch4_window7_224", 8), ("convnext_tiny", 8), ("ghostnet_100", 24),
)  # fmt: skip
HELD_OUT = (
    ("resnext50_32x4d", 12), ("seresnet50", 12), ("mobilevit_s", 12), ("poolformer_s12", 16), ("gmlp_s16_224", 16),
    ("mobilenetv4_conv_small", 32), ("rexnet_100", 16), ("dla34", 16), ("xcit_tiny_12_p16_224", 12),
    ("vit_small_patch32_224", 32), ("torchvision/mnasnet1_0", 24), ("edgenext_small", 16), ("cspresnet50", 12),
    ("inception_v3", 8), ("regnetx_008", 24), ("torchvision/squeezenet1_0", 24),
)  # fmt: skip
CHANNELS_LAST = (
    ("efficientnet_b0", 24), ("mobilenetv3_large_100", 24), ("resnet50", 16), ("convnext_atto", 16),
    ("regnety_004", 24), ("densenet121", 8),
)  # fmt: skip
SETTINGS = (("fp32", "adamw"), ("fp16", "sgd"), ("bf16", "adamw"), ("fp32", "sgd"), ("fp16", "adamw"), ("bf16", "sgd"))


@dataclass(frozen=True)
class Case:
    """A recipe; `group` says whether it was looked at while the predictor was made."""

    group: str
    overrides: tuple[str, ...]
    rung: str = "requested"

    def config(self) -> Config:
        cfg = compose_config(["data.num_workers=0", "device=cuda", *self.overrides])
        ladder = resolve(cfg)
        return next(rung.settings for rung in ladder if rung.name == self.rung)


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured bytes, in the order of QUANTITIES; `wrong` names a verdict that the card refutes."""

    title: str
    predicted: tuple[int | None, ...]
    measured: tuple[int, ...]
    wrong: str = ""
    unknown: str = ""

    def errors(self) -> list[float]:
        """In percent of what was measured."""
        return [100 * (p or 0) / m - 100 for p, m in zip(self.predicted, self.measured, strict=True)]

    def __str__(self) -> str:
        if self.unknown:
            return f"{self.title} | unknown: {self.unknown}"
        rows = zip(self.predicted, self.measured, self.errors(), strict=True)
        cells = [f"{(p or 0) / MiB:.0f} / {m / MiB:.0f} ({e:+.1f} %)" for p, m, e in rows]
        return " | ".join([self.title, *cells, self.wrong or "-"])


def cases() -> list[Case]:
    """Every rung of both ladders, two settings of each model that was looked at, one of the others; channels_last."""
    found = [
        Case("ladders", (f"ladder={ladder}",), rung.name)
        for ladder in ("default", "faithful")
        for rung in resolve(compose_config([f"ladder={ladder}"]))
        if not rung.passed_over
    ]
    models = [("looked at", *each) for each in LOOKED_AT] + [("held out", *each) for each in HELD_OUT]
    for number, (group, name, batch) in enumerate(models):
        for shift in (0, 3) if group == "looked at" else (0,):
            precision, optimizer = SETTINGS[(number + shift) % len(SETTINGS)]
            settings = (f"trainer.batch_size={batch}", f"trainer.precision={precision}", f"optimizer={optimizer}")
            found.append(Case(group, ("ladder=none", f"model.name={name}", *settings)))
    for number, (name, batch) in enumerate(CHANNELS_LAST):
        model = (f"model.name={name}", f"trainer.batch_size={batch}")
        layout = ("trainer.channels_last=true", f"trainer.precision={('bf16', 'fp16', 'fp32')[number % 3]}")
        found.append(Case("channels_last", ("ladder=none", *model, *layout)))
    return found


def run(case: Case) -> Outcome:
    """Predict and measure one recipe."""
    config = case.config()
    predictor = Predictor(spec_of(config))
    found, classes = predictor.predict(config), predictor.networks.classes(config)
    title = f"{case.group} | {recipe(config)}, {config.optimizer.name}"
    if found.min_capacity_bytes is None:
        return Outcome(title, (), (), unknown=found.reason)
    peaks = measure(config, classes)
    if peaks is None:
        return Outcome(title, (), (), unknown="does not fit the whole card")
    smallest, too_small = smallest_limit(config, classes, found.min_capacity_bytes)
    predicted = (found.allocated_bytes, found.reserved_bytes, found.min_capacity_bytes)
    return Outcome(title, predicted, (*peaks, smallest), refuted(found, smallest, too_small))


def refuted(found: Prediction, smallest: int, too_small: int) -> str:
    """The verdict that is false for a limit that holds, or for one that does not."""
    if verdict(found, smallest) == "hopeless":
        return "false hopeless"
    return "false fits" if verdict(found, too_small) == "fits" else ""


def smallest_limit(config: Config, classes: int, guess: int) -> tuple[int, int]:
    """The smallest limit that holds and the largest that does not, one step apart."""
    step = max(2 * MiB, int(guess * STEP))

    def holds(limit: int) -> bool:
        return measure(replace(config, memory=MemoryConfig(f"{limit}b")), classes) is not None

    limit, direction = guess, -1 if holds(guess) else 1
    for _ in range(MOST_STEPS):
        limit += direction * step
        if holds(limit) == (direction > 0):
            return (limit, limit - step) if direction > 0 else (limit + step, limit)
    return limit, limit


def summary(outcomes: list[Outcome]) -> list[str]:
    """Medians and worst errors of each group, and what was not as it should be."""
    rows = ["| recipes | number | " + " | ".join(f"{q}: median, worst" for q in QUANTITIES) + " |", "|---" * 5 + "|"]
    known = [outcome for outcome in outcomes if not outcome.unknown]
    groups = list(dict.fromkeys(outcome.title.split(" | ")[0] for outcome in known))
    for group in [*groups, ""]:
        mine = [outcome for outcome in known if outcome.title.startswith(group)]
        sizes = [[abs(error) for error in column] for column in zip(*(o.errors() for o in mine), strict=True)]
        cells = [f"{statistics.median(column):.2f} %, {max(column):.2f} %" for column in sizes]
        rows.append(f"| {group or 'all'} | {len(mine)} | {' | '.join(cells)} |")
    wrong = [f"{outcome.wrong}: {outcome.title}" for outcome in known if outcome.wrong]
    unknown = [f"{o.title}: {o.unknown}" for o in outcomes if o.unknown]
    return [*rows, "", f"False verdicts: {'; '.join(wrong) or 'none'}. Unknown: {'; '.join(unknown) or 'none'}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=6, help="processes at once; the limits are each process's own")
    parser.add_argument("--group", default=None, help="only this one")
    parser.add_argument("--part", nargs=2, type=int, default=(1, 1), metavar=("I", "N"), help="the I-th of N shares")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    asked = [case for case in cases() if arguments.group in (None, case.group)]
    outcomes: list[Outcome] = []
    head = ["| group | recipe | " + " | ".join(QUANTITIES) + " | wrong verdict |", "|---" * 6 + "|"]
    print("\n".join(head), flush=True)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for outcome in pool.map(run, asked[arguments.part[0] - 1 :: arguments.part[1]]):
            outcomes.append(outcome)
            print(f"| {outcome} |", flush=True)
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}"
    text = "\n".join([f"### accuracy: {about}", "", *summary(outcomes), ""])
    print(f"\n{text}")
    if arguments.out is not None:
        rows = [*head, *(f"| {outcome} |" for outcome in outcomes)]
        note = "MiB, predicted / measured (error)."
        (arguments.out / "accuracy.md").write_text("\n".join([text, note, "", *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
