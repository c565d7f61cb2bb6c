"""The examples and the code of the documentation do what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageColor
from torch import Tensor, nn

from adaptive_trainer import compose_config
from adaptive_trainer.cli.main import as_list
from scripts import benchmark, benchmark_start, benchmark_where, pictures, scaling_model
from scripts import benchmark_finders as finders
from tests.support.forking import ROOT, Launcher

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = (
    "model.name=mobilenetv3_small_050",
    "data=fakedata",
    "data.train.size=24",
    "data.val.size=8",
    "data.image_size=32",
    "data.num_workers=0",
    "trainer.batch_size=24",
    "memory.limit=28MiB",
)


def test_train_in_python(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run(*SMALL, script=ROOT / "scripts" / "train_in_python.py", folder=tmp_path)
    assert ended.code == 0, ended.text
    assert "rung batch-16, validation accuracy 0." in ended.out
    assert "trainer.batch_size: 24 -> 16 (rung batch-16 is used; out of memory: requested)" in ended.out
    assert "scores of one image: torch.Size([1, 10])" in ended.out


def run_script(name: str, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name)], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_descend_in_your_loop(tmp_path: Path) -> None:
    printed = run_script("descend_in_your_loop.py", tmp_path)
    assert "requested: oom Simulated card out of memory" in printed
    assert re.search(r"rung (batch|narrow)\S* fits, loss \d", printed)


def test_transaction_in_your_loop(tmp_path: Path) -> None:
    printed = run_script("transaction_in_your_loop.py", tmp_path)
    assert "requested: oom Simulated card out of memory" in printed
    assert "rung recompute fits, 10 updates are done" in printed


class Full(nn.Module):
    """Runs out of memory, in CUDA's words, for more than 13 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 13:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity")
        out: Tensor = self.body(x.flatten(1))
        return out


@pytest.fixture
def small_finders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DEVICE": torch.device("cpu"),
        "MODEL": "mobilenetv3_small_050",
        "SIZE": 32,
        "SAMPLES": 512,
    }.items():
        monkeypatch.setattr(finders, name, value)
    monkeypatch.setattr(finders, "make_model", Full)


def test_finders_of_ours_are_timed_to_the_first_update(small_finders: None) -> None:
    found = {name: finders.round_of(name, 34) for name in finders.CONTENDERS if name.startswith("ours")}
    assert found["ours, from 24"]["batch"] == 24
    largest = found["ours, max"]["batch"]
    assert finders.fits_alone(largest, 34)
    assert not finders.fits_alone(largest + 1, 34)
    assert found["ours, from 1024 (halving)"]["batch"] <= largest < 1024
    assert found["ours, max"]["failed"] >= 1
    assert all(answer["seconds"] > 0 for answer in found.values())


@pytest.mark.parametrize(
    ("name", "batch", "failed"),
    [
        ("accelerate, from 24", 12, 5),
        ("accelerate, from 1024", 13, 39),
        ("lightning, power", 8, 1),
        ("lightning, binsearch", 12, 2),  # 13, less lightning's margin of 5 %
    ],
)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_finders_of_the_peers_as_far_as_they_are_installed(
    name: str, batch: int, failed: int, small_finders: None
) -> None:
    pytest.importorskip(name.partition(",")[0])
    answer = finders.round_of(name, 34)
    assert (answer.get("batch"), answer.get("failed")) == (batch, failed), answer


def test_a_finder_that_fails_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finders.CONTENDERS, "breaks", lambda cap: dict[int, finders.Answer]()[cap])
    broken = finders.round_of("breaks", 900)
    good = [{"seconds": seconds, "batch": 12, "failed": 1} for seconds in (9.0, 1.0, 3.0, 2.0)]
    assert finders.lines_of(900, {"breaks": [broken], "works": good}, "13")[2:-1] == [
        "| breaks | failed: KeyError: 900 | - | - | - |",
        "| works | 2.00 (1.00 to 3.00) | 9.00 | 12 | 1 |",
        "| brute force | - | - | 13 | - |",
    ]


def test_finders_need_a_card(launcher: Launcher, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ended = run_module("scripts.benchmark_finders")
    assert ended.returncode == 1
    assert "there is no CUDA here" in ended.stderr


def run_module(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_benchmark_of_loading() -> None:
    options = ["--images", "24", "--size", "32", "--batch", "8", "--workers", "1", "--blocks", "1"]
    ended = run_module("scripts.benchmark_data", *options, "--model", "mobilenetv3_small_050")
    assert ended.returncode == 0, ended.stderr
    rows = [line.split(" | ") for line in ended.stdout.splitlines()]
    ways = ["ours, data.cache=disk", "ours, data.cache=ram", "ours, data.cache=none"]
    others = ["torchvision ImageFolder, DataLoader", "timm create_loader"]
    assert [row[0].removeprefix("| ") for row in rows if len(row) == 2][1:] == [*ways, *others]
    assert [row[0].removeprefix("| ") for row in rows if len(row) == 3][1:] == ["one batch", *ways]
    assert all(float(row[1].rstrip(" |")) > 0 for row in rows if row[0].startswith("| ours"))


def test_the_log_has_the_end_of_every_stage(launcher: Launcher, tmp_path: Path) -> None:
    begun = time.time()
    ended = launcher.run(
        *SMALL, "memory.limit=none", "hydra.run.dir=.", "hydra.verbose=[adaptive_trainer]", folder=tmp_path
    )
    assert ended.code == 0, ended.text
    lines = list(benchmark_start.times((tmp_path / "adaptive_trainer.log").read_text()))
    end = time.time()
    found = benchmark_start.stages(lines, begun, end)
    assert all(seconds >= 0 for seconds in found.values())
    of_all = (benchmark_start.TO_FIRST, benchmark_start.TRAINING, benchmark_start.TO_EXIT)
    assert sum(found[name] for name in of_all) == pytest.approx(end - begun)
    assert sum(found[name] for name in benchmark_start.STAGES) == pytest.approx(found[benchmark_start.TO_FIRST])


def test_benchmarks_replace_their_tables_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Speed\n\n<!-- a -->\nold\n<!-- end of a -->\n\nMore\n", encoding="utf-8")
    works, fails = ["timeit", "-n1", "-r1", r"print(r'\1 new')"], ["timeit", "-n1", "-r1", "print('half'); 1 / 0"]
    monkeypatch.setattr(benchmark, "PARTS", {"a": works, "b": fails, "c": works})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--page", str(page)])
    with pytest.raises(SystemExit, match="not measured: b"):
        benchmark.main()
    text = re.sub("\n1 loop.*", "", page.read_text(encoding="utf-8"))
    parts = [f"<!-- {name} -->\n\\1 new\n<!-- end of {name} -->\n" for name in "ac"]
    assert text == f"# Speed\n\n{parts[0]}\nMore\n\n{parts[1]}"


# -- code blocks


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page:line, text) of every fenced block in one of the languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = [(match[1], text.count("\n", 0, match.start()) + 1, match[2]) for match in fences]
        found += [(f"{page.name}:{line}", code) for language, line, code in lines if language in languages]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page:line, arguments) of every `python -m adaptive_trainer` in a shell block."""
    found = []
    for place, text in blocks("bash", "sh", "shell", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for start, word in enumerate(words):
                if word == "adaptive_trainer" and words[start - 1] == "-m":
                    found.append((place, words[start + 1 :]))
    return found


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=lambda value: value.split("\n")[0][:60])
def test_python_of_the_documentation(place: str, code: str, launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    ended = launcher.run(script=script, folder=tmp_path / "work")
    assert ended.code == 0, f"{place}: {ended.text}"


@pytest.mark.parametrize(("place", "args"), commands(), ids=str)
def test_commands_of_the_documentation(place: str, args: list[str]) -> None:
    """They compose. A folder of the reader's own is not there, and what is asked of Hydra itself is Hydra's."""
    if "--config-dir" in args:
        pytest.skip("needs a folder of the reader's own")
    mine = [arg for arg in args if "=" in arg and not arg.startswith(("-", "hydra."))]
    sweeps = "-m" in args or "--multirun" in args
    overrides = [re.sub(r"(=[^\[{,]*),[^\]}]*$", r"\1", arg) if sweeps else as_list(arg) for arg in mine]
    assert compose_config(overrides).trainer.batch_size, place


# -- what scripts/benchmark_where.py counts


def test_traffic_counts_what_operators_read_and_write() -> None:
    a, b, row = torch.zeros(100, 10), torch.zeros(100, 10), torch.zeros(10)
    weight, images = torch.zeros(4, 3, 3, 3), torch.zeros(2, 3, 8, 8)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    nbytes = 4 * 1000
    for work, expected in (
        (lambda: a + b, 3 * nbytes),
        (lambda: a.t().reshape(10, 100), 0),  # views
        (lambda: a.add_(b), 3 * nbytes),
        (lambda: a.copy_(b), 2 * nbytes),
        (lambda: a.zero_(), nbytes),
        (lambda: torch.empty(100, 10), 0),
        (lambda: a + row.expand(100, 10), 2 * nbytes + 40),
        (lambda: torch.add(a, 1, out=b), 2 * nbytes),
        (lambda: torch._foreach_add_([a, b], 1), 4 * nbytes),
        (lambda: torch.conv2d(images, weight), 4 * (2 * 3 * 64 + 4 * 27 + 2 * 4 * 36)),
        # gradient and weight with two moments are read, these three written, and the count of steps
        (optimizer.step, 7 * nbytes + 3 * 4),
    ):
        with benchmark_where.Traffic(torch.device("cpu")) as traffic, torch.no_grad():
            work()
        assert traffic.bytes == expected


def test_covered_time_counts_overlaps_once() -> None:
    assert benchmark_where.covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5


def test_every_picture_of_the_documentation_is_there_and_small() -> None:
    named = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"""[("]([\w/.-]+\.png)[)"]""", page.read_text(encoding="utf-8"))
    }
    made = {*(ROOT / "docs" / "pictures").glob("*.png")}
    assert made <= named
    assert all(picture.stat().st_size < 300_000 for picture in named)


def test_a_picture_of_a_terminal(tmp_path: Path) -> None:
    pytest.importorskip("pyte")
    (tmp_path / "hello.py").write_text(r"print('one'); print('\x1b[33mtwo\x1b[0m')")
    at_one, at_end = pictures.in_terminal("python hello.py", tmp_path, "one")
    assert "".join(character.data for character in at_one[1]).rstrip() == "one"
    assert {character.fg for character in at_end[2][:3]} == {"brown"}
    colours = np.unique(np.asarray(pictures.draw(at_end).convert("RGB")).reshape(-1, 3), axis=0).tolist()
    assert [*ImageColor.getrgb(pictures.COLOURS["brown"])] in colours


def test_the_model_of_many_ranks_gives_what_was_measured_on_two() -> None:
    for size, seconds in (scaling_model.SUM_SMALL, scaling_model.SUM_LARGE):
        assert scaling_model.reduction(2, size, 25e9) == pytest.approx(seconds)
    for recipe, images in (("EfficientNet-B0 24@224", 3350), ("ResNet-50 24@224", 3393)):  # a second: docs/scaling.md
        assert scaling_model.update(2, recipe, 25e9) == pytest.approx(48 / images, rel=0.02)


def test_votes_grow_with_the_ranks_and_as_a_tree_with_their_logarithm() -> None:
    assert scaling_model.vote(1024) > 15 * scaling_model.vote(64)
    assert scaling_model.vote(1024, is_tree=True) < 5 * scaling_model.vote(64, is_tree=True)
    assert scaling_model.largest(0.01, 15e-3, votes=1) == 3


def test_throughput_is_lost_where_memory_runs_out_or_ranks_are_lost() -> None:
    assert scaling_model.left(0.0, 2.0) == 1
    assert scaling_model.left(0.5, 2.0) == 0.5
    lines = list(scaling_model.faults())
    assert len(lines) == 10
    assert lines[-1].startswith("| 1,024 | 9,766 / 977 / 98 |")
