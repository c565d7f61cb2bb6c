"""What is shown, where, and how wide; with real terminals, pipes and notebooks."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.recipe import Recipe, Technique
from adaptive_trainer.report.lines import Lines, step_down
from adaptive_trainer.report.listeners import Candidate
from adaptive_trainer.utils import screen
from adaptive_trainer.utils.launch import COMMAND
from adaptive_trainer.utils.progress import Progress
from adaptive_trainer.utils.screen import Screen, _broken, duration, nearby, show, showing
from adaptive_trainer.utils.tables import table
from tests.support.forking import ROOT, Launcher

FAKE = ("data=fakedata", "data.train.size=24", "data.val.size=8", "data.image_size=32", "data.num_workers=0")
SMALL = (*FAKE, "model.name=mobilenetv3_small_050", "trainer.batch_size=24", "memory.limit=28MiB", "trainer.epochs=2")
SCRIPT = """
import logging, sys
from adaptive_trainer import Trainer, compose_config
{configure}
result = Trainer(compose_config(sys.argv[1:]), output_dir="out").fit()
"""


def on_terminal(columns: int, args: list[str], folder: Path, **variables: str) -> str:
    """What a program writes to a terminal of that width."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (50, columns))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PWD": str(folder), **variables}
    process = subprocess.Popen([sys.executable, *args], cwd=folder, env=env, stdout=side, stderr=side)
    shown = b""
    while process.poll() is None or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.1)[0]:
            shown += os.read(main, 4096)
    os.close(main)
    os.close(side)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


# -- the command line


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_every_line_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    report = f"report={str(columns == 80).lower()}"  # a line at any width, and seconds
    shown = on_terminal(columns, ["-m", "adaptive_trainer", *SMALL, report], tmp_path, NO_COLOR="1")
    assert "\x1b[3" not in shown  # no colours
    assert re.search(r"epoch 1/2: \d/2, [\d.]+ img/s", shown)
    lines = [piece for line in shown.splitlines() for piece in line.split("\r")]
    long = [line for line in lines if len(line) > columns and " " in line.strip() and COMMAND not in line]
    assert not [line for line in long if "outputs/" not in line]  # which is a word of its own
    words = " ".join(shown.split())
    assert "plan: rung requested, predicted 30 of 28 MiB" in words
    assert "-> rung batch-16, predicted 28 of 28 MiB; given up: batch 24 -> 16; kept: mobile" in words
    assert "trained on rung batch-16" in words
    assert re.search(r"requested +oom +30 +\d+ +28 ", shown)


def test_colours_are_for_terminals(tmp_path: Path) -> None:
    shown = on_terminal(
        80, ["-m", "adaptive_trainer", *SMALL, "report=false", "hydra.run.dir=out"], tmp_path, NO_COLOR=""
    )
    assert "\x1b[1mdevice:\x1b[0m a simulated card" in shown
    assert "\x1b[33mstep down: requested" in shown
    assert "resume=auto output_dir=out trainer.epochs=4" in shown  # from where the run was started
    assert "\x1b" not in (tmp_path / "out" / "adaptive_trainer.log").read_text()


@pytest.mark.parametrize("verbosity", ["quiet", "debug"])
def test_verbosity(verbosity: str, launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run(*SMALL, f"verbosity={verbosity}", "hydra.run.dir=out", folder=tmp_path)
    assert ended.code == 0, ended.text
    if verbosity == "quiet":  # what changes the recipe is said all the same
        assert re.fullmatch(r"step down: requested .*\n", ended.out)
    else:
        assert "update 1 is made" in ended.out
    assert "epoch 2/2: loss" in (tmp_path / "out" / "adaptive_trainer.log").read_text()


def test_what_nobody_reads_is_not_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = ["first", "second"]
    monkeypatch.setattr(Judge, "kept_by_exact", lambda *_: said.pop(0))
    for level in ("WARNING", "INFO"):
        with caplog.at_level(level):
            Trainer(compose_config([*SMALL, "trainer.epochs=1", "report=false"]), output_dir=tmp_path / level).fit()
    assert said == ["second"]
    assert "\nfirst\n" in caplog.text


@pytest.mark.parametrize(
    "quoted",
    ["""'output_dir="/my photos 한글/the third run of today"'""", "'/my photos 한글/and some more of them/best.pt'"],
)
def test_what_is_copied_is_not_broken(quoted: str) -> None:
    command = f"train on: {COMMAND} resume=auto {quoted} trainer.epochs=2"
    assert _broken(command, 40) == command
    text = f"this run's state is saved; go on with resume=auto {quoted}, or leave it (it's yours to say)"
    broken = _broken(text, 40)
    assert quoted in broken
    assert broken.replace("\n  ", " ") == text
    assert all(len(line) <= 40 or quoted in line for line in broken.splitlines())


@pytest.mark.parametrize("before", ["report: ", "the earlier run in ", "nothing is to be found in data.root="])
def test_a_path_with_blanks_is_not_broken(before: str, tmp_path: Path) -> None:
    path = tmp_path / "my photos of" / "a long day"
    path.mkdir(parents=True)
    line = f"{before}{path}, which is only there to be broken in two or three lines"
    assert str(path) in _broken(line, 60)
    path.rmdir()
    assert str(path) not in _broken(line, len(before) + len(str(path)) - 4)  # by chance these words are no path


def test_the_end_names_what_there_is_and_what_to_type(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run(*SMALL, "hydra.run.dir=out", folder=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    *_, end = ended.out.partition("trained on rung batch-16: mobilenetv3_small_050, batch 16")
    assert "val accuracy" in end
    assert "changed: trainer.batch_size 24 -> 16 (rung batch-16 is used; " in end
    for name in ("checkpoints/best.pt", "result.json", "adaptive_trainer.log"):
        assert re.search(rf"(?m)^[\w ]+: \S*out/{re.escape(name)}$", end)
        assert (tmp_path / "out" / name).exists()
    assert max(len(line) for line in ended.out.splitlines() if COMMAND not in line) <= 180
    command = re.search(r"(?m)^train on: python -m adaptive_trainer (.*)$", end)
    assert command
    again = launcher.run(*command[1].split(), folder=tmp_path)
    assert again.code == 0, again.text
    assert "epoch 4/4" in again.out
    nothing_left = launcher.run("resume=auto", "output_dir=out", "trainer.epochs=3", folder=tmp_path)
    assert re.search(r"(?m)^train on: .* trainer\.epochs=8$", nothing_left.out)  # twice the four that are trained
    log = (tmp_path / "out" / "adaptive_trainer.log").read_text()
    assert re.search(r"(?m)^\[\d{4}-\d\d-\d\d [\d:,]+\]\[adaptive_trainer\.[\w.]+\]\[INFO\] - epoch 1/2", log)
    assert "[adaptive_trainer" not in ended.out  # times and names are in the file


def test_a_plan_says_where_it_is_written(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run("task=plan", "card=rtx2060", *FAKE, "hydra.run.dir=out", folder=tmp_path)
    assert ended.code == 0, ended.text
    assert re.search(r"(?m)^written: plan\.json in \S*out$", ended.out)
    assert max(map(len, ended.out.splitlines())) <= 120
    assert re.search(r"(?m)^requested +fits( +\d+){5}$", ended.out)
    assert "    efficientnet_b0, batch 24, image 32, fp32" in ended.out.splitlines()


@pytest.mark.slow  # ten processes
@pytest.mark.parametrize("columns", ["80", ""])
def test_columns_say_how_wide_a_pipe_is_read(columns: str, launcher: Launcher, tmp_path: Path) -> None:
    """Without it lines stay whole, for programs; words are never broken."""
    env = {"COLUMNS": columns}
    shown = [
        launcher.run(*typed, "hydra.run.dir=out", folder=tmp_path, env=env)
        for typed in (
            SMALL,
            (*SMALL, "ladder=exact", "memory.limit=4MiB"),
            ("task=plan", "card=rtx2060", *FAKE),
            ("task=memory", "card=rtx2060", "batch=2", "size=32", "model.name=mobilenetv3_small_050"),
            ("trainer.epoch=3", "data.hflip=often", f"data.root={'a/' * 60}"),
            ("--help",),
        )
    ]
    lines = [line for ended in shown for line in ended.text.splitlines()]
    long = [line for line in lines if len(line) > 80 and len(line.split()) > 1 and COMMAND not in line]
    assert bool(long) == (not columns), long
    assert [ended.code for ended in shown] == [0, 3, 0, 0, 2, 0]


# -- in Python


@pytest.mark.parametrize(
    ("configure", "is_shown"),
    [
        ("", True),
        ("logging.basicConfig(filename='own.log', level=logging.INFO)", False),
        ("logging.getLogger('adaptive_trainer').addHandler(logging.NullHandler())", False),
        ("logging.getLogger('adaptive_trainer').setLevel(logging.ERROR)", False),
    ],
)
def test_a_script_shows_what_happens(configure: str, is_shown: bool, launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(configure=configure))
    ended = launcher.run(*SMALL, "report=false", script=script, folder=tmp_path)
    assert ended.code == 0, ended.text
    said = (
        "step down: requested (",
        "rung batch-16 fits",
        "epoch 1/2: loss",
        "best model: ",
        "trained on rung batch-16",
    )
    assert [text in ended.out for text in said] == [is_shown] * len(said)
    assert ended.out.count("epoch 1/2: loss") == is_shown
    assert ended.err == ""
    assert "basicConfig" not in configure or "epoch 2/2" in (tmp_path / "own.log").read_text()


def test_logging_is_as_before_afterwards() -> None:
    ours, root = logging.getLogger("adaptive_trainer"), logging.getLogger()
    kept, root.handlers = root.handlers, []
    try:
        before = ours.level
        with showing("debug"):
            assert [type(handler) for handler in ours.handlers] == [Screen]
            with showing():  # a training within another program's
                assert len(ours.handlers) == 1
        assert (ours.handlers, ours.level) == ([], before)
    finally:
        root.handlers = kept


def test_a_notebook_shows_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    spec = tmp_path / "kernels" / "here"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.joinpath("kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    for name, value in (("JUPYTER_PATH", tmp_path), ("PYTHONPATH", ROOT), ("IPYTHONDIR", tmp_path / "ipython")):
        monkeypatch.setenv(name, str(value))
    source = SCRIPT.format(configure="").replace("sys.argv[1:]", repr([*SMALL, "report=false"]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="here", timeout=120, resources=resources).execute()
    outputs = notebook.cells[0]["outputs"]
    red = "".join(output["text"] for output in outputs if output["name"] == "stderr")
    assert all("IProgress" in line or "import" in line for line in red.splitlines())  # when timm is imported
    text = "".join(output["text"] for output in outputs if output["name"] == "stdout")
    assert all(said in text for said in ("rung batch-16 fits", "epoch 1/2: loss", "best model: "))
    assert re.search(r"epoch 1/2: \d/2, ", text)  # the line that moves


# -- the pieces


def test_a_line_of_progress_has_counts_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    figures = lambda: ("loss 2.5", "", "rung half")  # noqa: E731
    with (
        caplog.at_level("INFO"),
        Progress("epoch 1/3:", 1010, 10, figures=figures, later=2020, clock=lambda: now) as progress,
    ):
        for _ in range(1000):
            now += 1
            progress.advance(1)
    lines = caplog.messages
    assert lines[0] == "epoch 1/3: 15/1010 images, 50 min left, 1 img/s, loss 2.5, rung half"
    times = [int(re.findall(r"(\d+)/1010", line)[0]) - 10 for line in lines]
    pauses = [after - before for before, after in zip([0, *times], times, strict=False)]
    assert pauses == sorted(pauses)  # rarer and rarer
    assert (pauses[0], pauses[-1]) == (5, 60)
    assert len(lines) < 40


def test_updates_are_counted_where_a_step_is_given(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    with caplog.at_level("INFO"), Progress("epoch 1/1:", 100, step=8, clock=lambda: now) as progress:
        for _ in range(5):
            now += 2
            progress.advance(8)
    assert caplog.messages[0].startswith("epoch 1/1: 3/13, ")


def test_time_left_is_not_that_of_the_slow_first_updates(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    with caplog.at_level("INFO"), Progress("epoch 1/1:", 800, step=8, clock=lambda: now) as progress:
        for seconds in (20, 20, 20, 1, 1, 1, 1, 1, *[1] * 20):
            now += seconds
            progress.advance(8)
    first, *_, last = caplog.messages
    assert first == "epoch 1/1: 1/100, 0.4 img/s"
    assert re.fullmatch(r"epoch 1/1: (1\d|2\d)/100, \d\d s left, 8 img/s", last)
    lines = Lines()
    row = {"val_accuracy": 0.5, "train_loss": 1.0, "val_loss": 1.0}
    caplog.clear()
    with caplog.at_level("INFO"):
        lines.epoch({**row, "epoch": 1, "updates": 6, "seconds": 16.0}, 25)
        lines.epoch({**row, "epoch": 2, "updates": 12, "seconds": 0.6}, 25)
        Lines().epoch({**row, "epoch": 1, "updates": 100, "seconds": 16.0}, 25)
    assert ["left" in line for line in caplog.messages] == [False, True, True]


def test_no_line_of_progress_for_what_is_quick(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Progress("evaluation:", 3, clock=lambda: 1.0) as progress:
        progress.advance(3)
    assert caplog.messages == []


def test_a_step_down_says_what_was_given_up_and_kept() -> None:
    before = Recipe(
        model="net", batch_size=24, micro_batch_size=24, techniques=(Technique("recompute", "none", "", ""),)
    )
    recomputed = (Technique("recompute", "most", "", ""),)
    after = replace(before, batch_size=8, micro_batch_size=4, precision="fp16", techniques=recomputed)
    failed = [
        Attempt("requested", Outcome.SKIPPED, predicted_bytes=900 * 2**20),
        Attempt("half", Outcome.OOM, "backward", peak_allocated_bytes=500 * 2**20),
    ]
    rung = Candidate("amp", after, before, 400 * 2**20, 512 * 2**20, 1.25, updates=7)
    assert step_down(failed, rung) == (
        "half (out of memory in backward, peak 500 MiB), requested (predicted 900 MiB) -> rung amp, predicted 400 of "
        "512 MiB, 1.25 x the time; given up: batch 24 -> 8, fp32 -> fp16, micro-batches of 24 -> 4; changed, exact: "
        "recompute none -> most; kept: net, image 224, all 7 updates"
    )
    exact = replace(rung, recipe=replace(before, techniques=recomputed))
    assert "given up" not in step_down(failed, exact)


def test_the_plan_says_that_nothing_fits_and_by_how_much(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe(model="net", batch_size=4, micro_batch_size=4)
    with caplog.at_level("INFO"):
        Lines().candidate(Candidate("small", recipe, recipe, 278 * 2**20, 20 * 2**20, is_last_resort=True))
        Lines().candidate(Candidate("small", recipe, recipe, 30 * 2**20, 28 * 2**20))
    assert caplog.messages == [
        "plan: rung small, predicted 278 of 20 MiB; that is 258 MiB too much, and no rung is predicted to fit",
        "plan: rung small, predicted 30 of 28 MiB; that is 2.0 MiB too much, but it may fit",
    ]


CELL = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=12)


@given(st.data(), st.integers(20, 200), st.integers(1, 9))
def test_tables_fit_and_lose_nothing(data: st.DataObject, columns: int, count: int) -> None:
    row = st.tuples(*[CELL] * count, st.lists(CELL, max_size=30).map(" ".join))
    rows = data.draw(st.lists(row, min_size=2, max_size=5))
    text = table(rows, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    words = text.replace(",", " ").replace(":", " ").split()
    for each in rows[1:]:
        assert all(word in words for cell in each for word in cell.split())


def test_a_table_that_is_wide_enough_has_a_line_a_row() -> None:
    rows = [
        ("rung", "outcome", "peak MiB", "why"),
        ("requested", "skipped", "-", "too large"),
        ("half", "fits", "5", ""),
    ]
    assert table(rows, left=(0, 1), columns=80).splitlines() == [
        "rung       outcome  peak MiB  why",
        "requested  skipped         -  too large",
        "half       fits            5",
    ]
    assert table(rows, left=(0, 1), columns=30).splitlines() == [
        "rung       outcome  peak MiB",
        "    why",
        "requested  skipped         -",
        "    too large",
        "half       fits            5",
    ]
    assert table(rows, left=(0, 1), columns=24).splitlines()[0] == "                    peak"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (150, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_cannot_be_shown_stops_nothing() -> None:
    show("nobody", None)
    closed = io.StringIO()
    closed.close()
    show("closed", closed)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    show("klasse é 猫", stream)
    assert raw.getvalue() == b"klasse ? ?\n"


def test_a_reader_that_has_gone_stops_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        show("one", stream)
        show("two", stream)


def test_paths_can_be_typed_where_the_program_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    assert nearby(tmp_path / "out" / "best.pt") == "out/best.pt"
    assert nearby(Path("/elsewhere/best.pt")) == "/elsewhere/best.pt"
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")  # as hydra.job.chdir does
    assert nearby(tmp_path / "out" / "best.pt") == str(tmp_path / "out" / "best.pt")


@pytest.mark.parametrize(
    ("logger", "level", "out", "err"),
    [
        ("adaptive_trainer.training.epochs.loop", logging.INFO, "text\n", ""),
        ("adaptive_trainer.training.epochs.loop", logging.WARNING, "text\n", ""),
        ("adaptive_trainer.training.epochs.loop", logging.ERROR, "", "text\n"),
        ("timm.models", logging.INFO, "", ""),
        ("timm.models", logging.WARNING, "", "text\n"),
        ("adaptive_trainer_of_another", logging.INFO, "", ""),
    ],
)
def test_which_lines_are_shown_where(
    logger: str, level: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Screen().handle(logging.LogRecord(logger, level, "", 0, "text", None, None))
    assert capsys.readouterr() == (out, err)
    assert screen.width() == 80
