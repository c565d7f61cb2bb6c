"""report.html: complete, self-contained, and no reason for a training to fail."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptive_trainer import Result, Trainer, compose_config
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.errors import override
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.report.history import MOST_SAMPLES, History
from adaptive_trainer.report.listeners import Answers, Finished, Listener, Sample
from adaptive_trainer.report.page import Report
from adaptive_trainer.report.plots import _on

SMALL = (
    "data=fakedata", "data.train.size=24", "data.val.size=8", "data.image_size=32", "data.num_workers=0", "report=true",
    "model.name=mobilenetv3_small_050", "trainer.batch_size=24", "memory.limit=28MiB", "trainer.epochs=2",
)  # fmt: skip
PLOTS = {"ladder", "memory", "update", "peak", "loss", "accuracy", "throughput", "confusion"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<iframe id="page" src="report.html" style="width:{width}px;height:4000px;border:0"></iframe>
<script>
const errors = [];
onload = () => {{
  const page = document.getElementById("page").contentWindow, root = page.document.documentElement;
  page.onerror = text => errors.push(text);
  const pictures = [...page.document.querySelectorAll(".plots img")].map(each => {{
    const box = each.getBoundingClientRect();
    return [each.id, each.naturalWidth, box.left, box.right, box.height];
  }});
  const found = {{errors, scroll: root.scrollWidth, pictures}};
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}};
</script>"""


class Blocks(Listener):
    """Puts a file where the plots are to go."""

    def start(self, folder: Path, settings: str) -> None:
        (folder / "plots").write_text("")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    Trainer(compose_config(list(SMALL)), output_dir=folder).fit()
    return folder


def is_drawn(content: bytes) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    return bool(pixels.min() < 200 and pixels.std() > 5)


def test_every_plot_is_in_the_page_and_beside_it(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = {
        name: base64.b64decode(picture)
        for picture, name in re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="(\w+)"', page)
    }
    assert found.keys() == PLOTS
    for name, picture in found.items():
        assert is_drawn(picture), name
        assert (folder / "plots" / f"{name}.png").read_bytes() == picture


def test_the_page_asks_for_nothing_outside(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)


def test_the_page_says_what_was_asked_used_and_advised(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<td>batch_size</td><td>24</td>\s*<td><b>16</b></td>", page)
    assert "changed: trainer.batch_size 24 -&gt; 16" in page
    needs = re.findall(r'<code>([^<]+)</code></td><td class="n">(\d+)</td>\s*<td class="n">(-?\d+)</td>', page)
    assert needs[0][0] == "trainer.batch_size=24 trainer.micro_batch_size=16"
    assert all(28 - int(need) == int(saved) for _, need, saved in needs)  # what rung batch-16 needs
    assert page.count("data:image/jpeg;base64,") == page.count("<figcaption>") > 0
    assert "out of memory" in (folder / "result.json").read_text(encoding="utf-8")


def test_a_report_that_fails_fails_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = compose_config([*SMALL, f"+trackers.mine._target_={__name__}.Blocks"])
    assert Trainer(settings, output_dir=tmp_path / "run").fit().outcome == "trained"
    assert "there is no report: FileExistsError" in caplog.text
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_report_of_an_earlier_attempt_does_not_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("no trace")

    ended(tmp_path, "cat", "dog")
    assert (tmp_path / "report.html").exists()
    ended(tmp_path, "cat", "dog", timeline=fail)
    assert not (tmp_path / "report.html").exists()
    assert not [*(tmp_path / "plots").iterdir()]
    assert [record.getMessage() for record in caplog.records] == ["there is no report: ValueError: no trace"]


@pytest.fixture(scope="module")
def run_on_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos that are all the same, so that nothing can be learned; they lie in `photos` beside it."""
    root = tmp_path_factory.mktemp("photos")
    for name, count in (("cat", 8), ("dog", 4)):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 40), "red").save(root / "photos" / name / f"{number}.png")
    settings = ["data=imagefolder", override("data.root", root / "photos"), "data.image_size=32", "data.num_workers=0"]
    settings += ["model.name=mobilenetv3_small_050", "trainer.batch_size=4", "data.val_fraction=0.25", "report=true"]
    Trainer(compose_config(settings), output_dir=root / "run").fit()
    return root / "run"


def test_the_page_says_what_was_trained_and_how_to_use_it(run_on_photos: Path) -> None:
    page = (run_on_photos / "report.html").read_text(encoding="utf-8")
    assert f"<td>{run_on_photos.parent / 'photos'}</td>" in page
    assert "9 training and 3 validation images, held out of the training set; 2 classes: cat, dog" in page
    assert "<th>epochs</th><td>1</td>" in page
    assert re.search(r"<th>ended</th><td>\d{4}-\d\d-\d\d \d\d:\d\d, after \d+ s</td>", page)
    best = run_on_photos / "checkpoints" / "best.pt"
    assert f"task=predict data.root=FOLDER model.weights={best}</code>" in page
    assert re.search(r'<td>cat</td><td class="n">6</td>\s*<td class="n">2</td>', page)
    assert re.search(r"<br>(cat|dog)/\d.png</figcaption>", page)


def test_advice_is_in_the_page(run_on_photos: Path) -> None:
    page = (run_on_photos / "report.html").read_text(encoding="utf-8")
    assert re.search(
        r"<li>val accuracy \d\d.\d % is not clearly above the share of the most frequent class, 66.7 %: nothing useful",
        page,
    )


def test_nothing_is_shown_for_memory_that_nothing_counts(run_on_photos: Path) -> None:
    page = (run_on_photos / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<td>requested</td><td>fits</td>\s*(<td class=\"n\"></td>\s*){3}<td class=\"n\">\d", page)


def test_many_classes_have_a_table_of_confusions(tmp_path: Path) -> None:
    ended(tmp_path, *(f"class {number}" for number in range(41)))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The largest confusions" in page
    assert re.search(r"<td>class 0</td><td>class 1</td><td class=\"n\">3</td>\s*<td class=\"n\">1.000</td>", page)
    assert not (tmp_path / "plots" / "confusion.png").exists()


def test_names_that_no_font_can_write_are_numbers_in_the_plot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended(tmp_path, "cat", "\U000e0fff")
    assert "1 cat, 2 \U000e0fff." in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "confusion.png").exists()
    assert caplog.text == ""


def test_a_run_with_nothing_left_to_train_has_a_report_too(folder: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"resume={folder / 'checkpoints' / 'last.pt'}"]
    Trainer(compose_config(settings), output_dir=tmp_path / "run").fit()
    assert "there is no confusion matrix" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def ended(folder: Path, *classes: str, timeline: Any = lambda: None, event: str = "") -> None:
    """Report a run that has taken the first class for the second."""
    report = Report(folder)
    report.answers(Answers({(0, 1): 3}, []))
    used = recipe(typed(compose_config([f"model.num_classes={len(classes)}"])))
    result = Result("trained", "requested", used, used, [], [event], {}, [], str(folder))
    report.trained(result, Finished(classes, lambda _: Image.new("RGB", (8, 8)), str, timeline, list))


def test_names_of_all_kinds_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    event = f"1 broken image is left out: {os.fsdecode(bytes([255]))}.jpg"  # bytes that are no text
    ended(tmp_path, "$x^$", "<b>", event=event)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>$x^$</td>" in page
    assert "<td>&lt;b&gt;</td>" in page
    assert "left out: ?.jpg" in page
    assert caplog.text == ""


def test_a_report_that_is_stopped_stops_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    ended(tmp_path, "cat", "dog", timeline=stop)
    assert "there is no report: KeyboardInterrupt" in caplog.text


def test_no_report_where_none_is_wanted(tmp_path: Path) -> None:
    Trainer(compose_config([*SMALL, "report=false"]), output_dir=tmp_path / "run").fit()
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "plots").exists()


def test_a_network_without_limit_has_a_report_too(tmp_path: Path) -> None:
    Trainer(compose_config([*SMALL, "memory.limit=none"]), output_dir=tmp_path / "run").fit()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'alt="(\w+)" id=', page)) == PLOTS - {"ladder", "memory"}
    assert "Nothing counts memory on this device" in page


def test_a_new_phase_goes_on_in_the_plots() -> None:
    assert _on([2, 4, 3, 6, 1]) == [2, 4, 7, 10, 11]


def test_what_is_heard_is_bounded() -> None:
    now = 0.0
    history = History(clock=lambda: now)
    for number in range(20 * MOST_SAMPLES):
        now += 1
        history.sample(Sample(number, number, 1, 2))
    assert MOST_SAMPLES / 4 <= len(history.samples) < MOST_SAMPLES
    times = np.diff([at for at, _ in history.samples])
    assert times.min() > 0
    assert history.samples[-1][1].updates > 19 * MOST_SAMPLES


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [375, 1440])
def test_the_page_fits_a_browser(width: int, folder: Path) -> None:
    (folder / "frame.html").write_text(FRAME.format(width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [str(BROWSER), *flags, f"--window-size={max(width + 50, 600)},4200", f"file://{folder}/frame.html"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(re.findall(r"<pre>(.*?)</pre>", ended.stdout, re.DOTALL)[0])
    assert found["errors"] == []
    assert found["scroll"] <= width
    assert {name for name, *_ in found["pictures"]} == PLOTS
    for name, pixels, left, right, height in found["pictures"]:
        assert pixels > 0, name
        assert left >= 0, name
        assert right <= width, name
        assert height > 100, name
