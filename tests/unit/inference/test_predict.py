"""Predictions are those of a plain loop, for whatever photos, batches and memory there are."""

from __future__ import annotations

import codecs
import csv
import json
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adaptive_trainer import DataError, LadderExhausted, ModelError, Trainer, compose_config, load_model
from adaptive_trainer.errors import Stopped
from adaptive_trainer.inference.model import Trained, load
from adaptive_trainer.inference.passes import opened
from adaptive_trainer.inference.predict import Files, Prediction, photos_of, predictions
from tests.support.faults import Fault
from tests.unit.inference.conftest import SETTINGS, photograph

EXACT = 1e-5  # batches of another size take other kernels


class Greedy(nn.Module):
    """The same scores, by way of so many copies of the images."""

    def __init__(self, network: nn.Module, copies: int) -> None:
        super().__init__()
        self.network, self.copies = network, copies

    def forward(self, images: Tensor) -> Any:
        return self.network(images.repeat(1, self.copies, 1, 1)[:, :3])


def predicted(
    best: Path | Trained,
    place: Any,
    *,
    events: list[str] | None = None,
    batch: int = 4,
    limit: str = "none",
    workers: int = 0,
) -> list[Prediction]:
    trained = best if isinstance(best, Trained) else load(best)
    config = trained.config
    config.trainer.eval_batch_size, config.memory.limit, config.data.num_workers = batch, limit, workers
    with opened(trained, config, ([] if events is None else events).append) as passes:
        return list(predictions(passes, photos_of(place), trained.classes))


def plain(best: Path, path: str | Path) -> Prediction:
    """One photo, by hand."""
    network: Any = load_model(best)
    with Image.open(path) as image, torch.no_grad():
        shares = network(network.transform(image)[None]).softmax(1)[0]
    order = shares.argsort(descending=True).tolist()
    return Prediction(str(path), tuple(network.classes[n] for n in order), tuple(float(shares[n]) for n in order))


def assert_same(found: list[Prediction], wanted: list[Prediction]) -> None:
    assert [(each.path, each.classes) for each in found] == [(each.path, each.classes) for each in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=EXACT)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_they_are_those_of_a_plain_loop(best: Path, photos: Path, workers: int) -> None:
    paths = sorted(str(path) for path in (photos / "test").rglob("*.jpg"))
    found = predicted(best, photos / "test", workers=workers)
    assert_same(found, [plain(best, path) for path in paths])
    assert len({each.classes[0] for each in found}) > 1  # else any order of classes would pass


def test_photos_as_people_have_them(best: Path, tmp_path: Path) -> None:
    """Photos that lie down, CMYK, 16 bits, grey, transparent: read as in training."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    photograph(
        tmp_path / "within" / "lies.jpg",
        1,
        0,
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    )
    order = ["alpha.webp", "cmyk.jpg", "deep.png", "grey.png", "within/lies.jpg"]
    assert_same(predicted(best, tmp_path), [plain(best, tmp_path / name) for name in order])


def test_files_that_cannot_be_read_keep_their_place(best: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "c.jpg", "e.jpg"):
        shutil.copy(photos / "test" / "red" / "0.jpg", tmp_path / name)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "d.png").write_text("no picture")
    (tmp_path / "notes.txt").write_text("no picture either, and nobody takes it for one")
    found = predicted(best, tmp_path, batch=2)
    assert [(Path(each.path).name, bool(each.classes)) for each in found] == [
        ("a.jpg", True), ("b.jpg", False), ("c.jpg", True), ("d.png", False), ("e.jpg", True),
    ]  # fmt: skip


def test_all_of_a_batch_cannot_be_read(best: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("no picture")
    assert [each.classes for each in predicted(best, tmp_path, batch=2)] == [(), (), ()]


def test_a_single_file_and_a_list(best: Path, photos: Path) -> None:
    one, folder = photos / "test" / "red" / "0.jpg", photos / "test" / "blue"
    assert_same(predicted(best, one), [plain(best, one)])
    assert [each.path for each in predicted(best, [str(one), folder, one])] == [
        str(one), *sorted(map(str, folder.iterdir()))
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "said"), [("gone", "neither a file nor a folder"), ("empty", "has no images")])
def test_places_without_photos(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        photos_of(tmp_path / name)


def test_a_batch_that_does_not_fit_is_halved(best: Path, photos: Path) -> None:
    """On a simulated card: no photo is lost, and none comes twice."""
    events: list[str] = []
    whole = predicted(best, photos / "test", batch=21)
    trained = load(best)
    greedy = replace(trained, network=Greedy(trained.network, 100))  # 1.2 MB an image
    assert_same(predicted(greedy, photos / "test", batch=21, limit="16MiB", events=events), whole)
    assert [event[:44] for event in events] == ["out of memory: batches of 21 -> 10 images, t"]


def test_memory_that_is_taken_away_meanwhile(best: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batches fit, a later one does not, again and again."""
    trained, events = load(best), list[str]()
    whole, calls = predicted(best, photos / "test"), 0
    forward = type(trained.network).forward

    def sometimes(self: Any, images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 3, 5, 6):  # each is tried twice
            raise torch.OutOfMemoryError("CUDA out of memory. Injected")
        return forward(self, images)

    monkeypatch.setattr(type(trained.network), "forward", sometimes)
    assert_same(predicted(best, photos / "test", batch=8, events=events), whole)
    assert [event.partition(" images")[0] for event in events] == [
        "out of memory: batches of 8 -> 4", "out of memory: batches of 4 -> 2",
    ]  # fmt: skip


def test_an_operator_that_fails_once_is_tried_once_more(best: Path, photos: Path) -> None:
    trained, events = load(best), list[str]()
    with opened(trained, trained.config, events.append) as passes, Fault(at=200) as fault:
        found = list(predictions(passes, photos_of(photos / "test"), trained.classes))
    assert fault.raised == 1
    assert_same(found, predicted(best, photos / "test"))
    assert events == []


def test_a_single_photo_that_does_not_fit(best: Path, photos: Path) -> None:
    trained = load(best)
    greedy = replace(trained, network=Greedy(trained.network, 2000))  # 25 MB an image
    with pytest.raises(LadderExhausted, match=r"a single image does not fit: .*; there is a simulated card of 16 MiB"):
        predicted(greedy, photos / "test", limit="16MiB")


def test_an_output_of_another_kind(best: Path, photos: Path) -> None:
    trained = replace(load(best), network=nn.Flatten())
    with opened(trained, trained.config, print) as passes, pytest.raises(ModelError, match=r"of shape \(21, 3072\)"):
        list(predictions(passes, photos_of(photos / "test"), trained.classes))


def test_the_files(best: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b'odd \xff, "name".jpg')
    found = [Prediction(odd, ("a, b", "ü"), (0.75, 0.25)), Prediction("broken.jpg")]
    with Files(tmp_path / "out", best, 2) as files:
        for each in found:
            files.add(each)
        assert not list(tmp_path.glob("out/predictions.???"))  # until they are whole
    with (tmp_path / "out" / "predictions.csv").open(
        encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "class_1", "probability_1", "class_2", "probability_2"],
        [odd, "a, b", "0.75", "ü", "0.25"],
        ["broken.jpg", "", "", "", ""],
    ]
    assert (tmp_path / "out" / "predictions.csv").read_bytes().startswith(codecs.BOM_UTF8)  # for Excel
    text = (tmp_path / "out" / "predictions.json").read_text(encoding="utf-8")
    assert '"ü"' in text
    assert json.loads(text) == {
        "model": str(best),
        "predictions": [
            {"path": odd, "classes": ["a, b", "ü"], "probabilities": [0.75, 0.25]},
            {"path": "broken.jpg", "classes": [], "probabilities": []},
        ],
    }


def test_files_of_a_run_that_failed_are_not_left(best: Path, tmp_path: Path) -> None:
    def fails() -> None:
        with Files(tmp_path, best, 2) as files:
            files.add(Prediction("a.jpg", ("a",), (1.0,)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_twenty_thousand_photos_hold_their_memory(
    best: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "small.jpg"
    Image.open(photos / "test" / "red" / "0.jpg").resize((32, 32)).save(small)
    (tmp_path / "many").mkdir()
    for number in range(20_000):
        os.link(small, tmp_path / "many" / f"{number}.jpg")
    trained = load(best)
    caplog.set_level(logging.INFO)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB

    def found() -> Iterator[int]:
        with opened(trained, trained.config, print) as passes, Files(tmp_path / "out", best, 3) as files:
            for number, each in enumerate(predictions(passes, photos_of(tmp_path / "many"), trained.classes), start=1):
                files.add(each)
                if number in (2_000, 20_000):
                    yield peak()

    early, late = found()
    assert late - early < 16
    assert "prediction: " in caplog.text  # how far it has come
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert sum(1 for _ in file) == 20_001


def test_an_interrupt_is_no_traceback(photos: Path, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptive_trainer.inference.passes.Passes._forward", stopped)
    trainer = Trainer(compose_config([*SETTINGS, f"data.root={photos}"]), output_dir=best.parents[1])
    for use in (trainer.evaluate, lambda: trainer.predict(photos)):
        with pytest.raises(Stopped) as caught:
            use()
        assert caught.value._render_traceback_() == ["stopped by Ctrl-C", "the pass over the images has to begin again"]
