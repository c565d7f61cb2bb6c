"""The command line in processes of their own: exit codes, messages, what is written where, sweeps, stages."""

from __future__ import annotations

import csv
import gc
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive_trainer import Interrupted, __version__, load_model
from adaptive_trainer.cli.main import _uncollected
from tests.support.forking import ROOT, Ended, Launcher

MODEL = ("model.name=mobilenetv3_small_050", "data.image_size=32", "data.num_workers=0", "hydra.run.dir=out")
FAKE = ("data=fakedata", "data.train.size=24", "data.val.size=8")
SMALL = (*MODEL, *FAKE, "trainer.batch_size=8")
NO_LADDER = (*SMALL, "ladder=none")

HALVED = ("trainer.batch_size=24", "memory.limit=28MiB")  # batch 24 needs 30 MiB, batch 16 and 8 need 28 and 26
GIVEN_UP = ("oom", "skipped")  # it may be seen beforehand that a rung does not fit

KILLS_ITS_WORKER = """
import os, signal
from pathlib import Path
import torch
from torch.utils.data import Dataset, get_worker_info

class Images(Dataset):
    classes = ["a", "b"]

    def __len__(self):
        return 24

    def __getitem__(self, index):
        worker = get_worker_info()
        if worker is not None and index == 7 and not (mark := Path(f"killed-{worker.num_workers}")).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3, 32, 32), index / 24), index % 2
"""
BROKEN_CARD = """
from torch.utils.data import Dataset

class Images(Dataset):
    classes = ["a", "b"]

    def __len__(self):
        return 24

    def __getitem__(self, index):
        raise RuntimeError("CUDA error: device-side assert triggered")
"""


@pytest.fixture
def cli(launcher: Launcher, tmp_path: Path) -> Any:
    """Run the command line in a folder of its own: `cli("key=value", ...)`."""

    def run(*args: str, **how: Any) -> Ended:
        return launcher.run(*args, folder=tmp_path, **how)

    return run


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def images(folder: Path, classes: str = "ab", count: int = 6) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), (number * 20, ord(name), 0)).save(folder / name / f"{number}.png")
    return folder


def wait_for(folder: Path, pattern: str) -> Path:
    """The file, once it has come."""
    until = time.monotonic() + 60
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < until, f"{pattern} has not come"
        time.sleep(0.05)
    return found[0]


def message(ended: Ended) -> str:
    """What an ended process has said, without what the log puts in front."""
    return re.sub(r"(?m)^\[[\d: ,-]+\]\[[\w.]+\]\[\w+\] - ", "", ended.text)


def test_the_doctor(cli: Any, tmp_path: Path) -> None:
    ended = cli("task=doctor", "device=cpu", "hydra.run.dir=out")
    assert (ended.code, "result: nothing prevents training here" in message(ended)) == (0, True)
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["adaptive_trainer.log"]
    stopped = cli("task=doctor", "device=cuda:99", "verbosity=quiet", "hydra.run.dir=out")
    assert stopped.code == 2
    assert message(stopped).startswith("problem: ")
    assert "error: problems: 1; what to do is said above" in message(stopped)


# -- as the user starts it


def python_m(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--help"], 0, "\n  batch_size: 24\n"),
        (["--help", "trainr.epochs=3"], 2, "there is no setting trainr.epochs; did you mean trainer.epochs?"),
        (["-h"], 0, "task=predict data.root=FOLDER"),
        (["data=imagefolder", "-h"], 0, "digits"),
        (["--version"], 0, f"adaptive_trainer {__version__}"),
        (["--hydra-help"], 0, "--multirun"),
        (["--cfg", "job"], 0, "batch_size: 24"),
        (["trainer.batchsize=3"], 2, "there is no setting trainer.batchsize; did you mean trainer.batch_size"),
        (["+trainer.batchsize=3"], 2, "there is no setting trainer.batchsize; did you mean trainer.batch_size"),
        (["-m", "+sweep=lr", "ladder=nowhere"], 2, "Could not find 'ladder/nowhere'"),
        (["hydra.run.dir=/dev/null/x"], 2, "hydra.run.dir=/dev/null/x cannot be made"),
        (["-m", "seed=1,2", "hydra.sweep.dir=/dev/null/x"], 2, "hydra.sweep.dir=/dev/null/x cannot be made"),
        (["-m", "seed=1,2", "output_dir=all"], 2, "hydra.sweep.dir=all is a folder for the folders of all jobs"),
        (["-m", "seed=1,2", "++output_dir=all"], 2, "hydra.sweep.dir=all is a folder for the folders of all jobs"),
        (["ladder=nowhere"], 2, "Could not find 'ladder/nowhere'"),
        (["trainer.engine=fast"], 2, "trainer.engine=fast is none of auto, eager, graph, compile"),
        (["memory.limit=1MiB"], 2, "memory.limit='1MiB' is less than the 2 MiB"),
        (["memory.limit=1MiB", "trainer.epochs=0"], 2, "trainer.epochs=0 is below 1; memory.limit='1MiB' is less than"),
        (["task=plan", "card=rtx2060", "memory.limit=1MiB"], 2, "memory.limit='1MiB' is less than the 2 MiB"),
        (["task=plan", "phases.stages=[{name:a,overrides:['trainer.epochs=0']}]"], 2, "trainer.epochs=0 is below 1"),
        (["card=rtx2060"], 2, "memory.limit=6144MiB sets the size"),
        (["task=plann"], 2, "task=plann is none of train, plan, memory"),
        (["data=imagefolder", "data.root=''"], 2, "data.root has no value"),
        (["data=imagefolder"], 2, "data.root has no value"),
        (["data=imagefolder", "data.root=photos"], 2, "data.root=photos is no folder"),
        (["data=imagefolder", "data.root=/dev/null"], 2, "data.root=/dev/null is no folder"),
        (["data=imagefolder", "data.root=."], 2, ". has one class folder, outputs"),
    ],
)
def test_answers_without_torch(args: list[str], code: int, said: str, tmp_path: Path) -> None:
    ended = python_m("-X", "importtime", "-m", "adaptive_trainer", *args, cwd=tmp_path)
    imported = set(re.findall(r"\| +([\w.]+)$", ended.stderr, flags=re.MULTILINE))
    assert ended.returncode == code
    assert said in (ended.stderr if code else ended.stdout)
    assert "Traceback" not in ended.stderr
    assert "adaptive_trainer.cli.main" in imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "timm", "torchvision", "numpy", "sklearn"}


def test_a_group_that_is_not_there_is_no_full_disk(tmp_path: Path) -> None:
    ended = python_m("-m", "adaptive_trainer", "ladder=defualt", cwd=tmp_path)
    assert "Available options in 'ladder':" in ended.stderr
    assert "cannot be written" not in ended.stderr
    assert "disk" not in ended.stderr


def test_nobody_reads_on(tmp_path: Path) -> None:
    """As in `... --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "adaptive_trainer", "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("module", ["hydra", "torch"])
def test_ctrl_c_while_packages_are_imported(module: str, tmp_path: Path) -> None:
    lines = [
        "import signal",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "signal.raise_signal(signal.SIGINT)",
    ]
    (tmp_path / f"{module}.py").write_text("\n".join(lines))  # a process started in the background ignores it
    ended = python_m("-m", "adaptive_trainer", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "stopped by Ctrl-C\nnothing is saved\n")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("resume=auto", "error: resume=auto: there is no earlier run to go on with in "),
        ("resume=gone.pt", "error: there is no checkpoint gone.pt; give the path of a .pt file, or resume=auto "),
        ("model.weights=gone.pt", "error: there is no checkpoint gone.pt; give the path of a .pt file\n"),
        ("task=export model.weights=gone.pt", "error: there is no checkpoint gone.pt; give the path of a .pt file\n"),
        ("task=predict data.root=gone model.weights=a.pt", "error: gone is neither a file nor a folder; give a photo"),
        ("task=evaluate data.root=gone model.weights=a.pt", "error: gone is no folder; give one with ROOT/CLASS"),
        ("task=plan data=imagefolder data.root=gone", "error: data.root=gone is no folder; give one with ROOT/CLASS"),
        ("task=plan data.root=gone", "error: data.root=gone is named, and these settings take no data from there"),
    ],
)
def test_what_is_not_there_is_said_before_torch_is_imported(typed: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "a.pt").touch()
    ended = python_m("-m", "adaptive_trainer", *typed.split(), "output_dir=out", cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(said)


def test_what_was_imported_is_left_out_of_collections() -> None:
    before = gc.get_freeze_count()
    with suppress(KeyboardInterrupt), _uncollected():
        assert not gc.isenabled()
        raise KeyboardInterrupt
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert gc.isenabled()
    assert frozen > before


@pytest.mark.parametrize("module", ["hydra", "torch"])
def test_sigterm_while_packages_are_imported(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)")
    ended = python_m("-m", "adaptive_trainer", "output_dir=out", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (143, "stopped by SIGTERM\nnothing is saved\n")


def test_sigterm_before_training_begins_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import signal\ndef make():\n    signal.raise_signal(signal.SIGTERM)")
    ended = python_m("-m", "adaptive_trainer", "data.train._target_=slow.make", "output_dir=out", cwd=tmp_path)
    assert ended.returncode == 143
    said = (
        r"stopped by SIGTERM\nnothing is saved; python -m adaptive_trainer resume=auto output_dir=\S*out begins again "
        r"with the same settings\n"
    )
    assert re.fullmatch(said, ended.stderr)
    assert result(tmp_path / "out")["outcome"] == "interrupted"


def test_a_log_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "out" / "adaptive_trainer.log").mkdir(parents=True)
    ended = python_m("-m", "adaptive_trainer", "hydra.run.dir=out", cwd=tmp_path)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "the output folder cannot be written: [Errno 21] Is a directory" in ended.stderr
    assert "Choose another hydra.run.dir" in ended.stderr


def test_the_main_job(tmp_path: Path) -> None:
    """Nothing asked for: the ladder is descended on the simulated card, and training begins."""
    command = [sys.executable, "-m", "adaptive_trainer"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=said, stderr=said)
    attempts = wait_for(tmp_path, "outputs/*/*/attempts.jsonl")
    until = time.monotonic() + 60
    while '"fits"' not in attempts.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == Interrupted.exit_code
    text, record = (tmp_path / "said").read_text(), result(attempts.parent)
    assert_descended(record["attempts"], text)
    assert record["outcome"] == "interrupted"


@pytest.mark.slow
def test_the_main_job_to_its_end(tmp_path: Path) -> None:
    """The digits are learned."""
    ended = python_m("-m", "adaptive_trainer", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    [folder] = tmp_path.glob("outputs/*/*")
    record = result(folder)
    assert_descended(record["attempts"], ended.stdout)
    assert f"trained on rung {record['rung']}: efficientnet_b0" in ended.stdout
    assert record["requested"]["batch_size"] == 24
    assert record["used"]["batch_size"] == 8
    assert record["metrics"]["val_accuracy"] > 0.3  # chance is 0.1
    assert "%|" not in ended.stderr


def assert_descended(attempts: list[dict[str, Any]], text: str) -> None:
    """Rungs were given up one after the other, and the last one fits."""
    assert "a simulated card of 512 MiB (no CUDA here" in text.splitlines()[0]
    assert [entry["outcome"] in GIVEN_UP for entry in attempts] == [True] * (len(attempts) - 1) + [False]
    assert len(attempts) > 4
    fits = attempts[-1]
    assert fits["outcome"] == "fits"
    assert f"rung {fits['rung']} fits: efficientnet_b0, batch 8" in text
    assert 0 < fits["peak_allocated_bytes"] <= fits["peak_reserved_bytes"] <= 512 * 2**20


def test_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    args = [sys.executable, "-m", "adaptive_trainer", *NO_LADDER]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(args, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=side)
    shown = b""
    while process.poll() is None or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.1)[0]:
            shown += os.read(main, 4096)
    os.close(main)
    os.close(side)  # kept until now: what was written is lost when the last holder of this side closes it
    assert process.returncode == 0
    assert b"epoch 1/1:" in shown
    assert b"img/s" in shown


# -- outputs


def test_outputs(cli: Any, tmp_path: Path) -> None:
    ended = cli(*SMALL, "trainer.epochs=2", *HALVED)
    assert ended.code == 0
    assert ended.err == ""  # no bar where no terminal is
    out = tmp_path / "out"
    record = result(out)
    assert record.keys() == {
        "outcome", "rung", "requested", "used", "changes", "events", "metrics", "attempts", "output_dir", "stages",
        "accumulation", "images", "ranks", "world_size",
    }  # fmt: skip
    assert (record["outcome"], record["rung"], record["accumulation"]) == ("trained", "batch-16", 1)
    assert [change["key"] for change in record["changes"]] == ["optimizer.lr", "trainer.batch_size"]
    assert "sqrt rule" in record["changes"][0]["why"]
    lines = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert lines == record["attempts"]
    assert [line["rung"] for line in lines] == ["requested", "batch-16"]
    assert lines[0]["outcome"] in GIVEN_UP
    assert lines[1]["outcome"] == "fits"
    assert 0 < lines[1]["peak_allocated_bytes"] <= lines[1]["peak_reserved_bytes"] <= 28 * 2**20
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["updates"], row["rung"]) for row in rows] == [
        ("1", "2", "batch-16"),
        ("2", "4", "batch-16"),
    ]
    assert float(rows[-1]["val_accuracy"]) == record["metrics"]["val_accuracy"]
    assert "batch_size: 24" in (out / "config.yaml").read_text()
    assert "trained on rung batch-16" in (out / "adaptive_trainer.log").read_text()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["best.pt", "last.pt"]
    assert load_model(out / "checkpoints" / "best.pt")
    assert re.search(r"(?m)^rung +outcome +predicted +peak +reserved", message(ended))


def test_output_dir(cli: Any, tmp_path: Path) -> None:
    assert cli(*NO_LADDER, "output_dir=elsewhere").code == 0
    assert result(tmp_path / "elsewhere")["outcome"] == "trained"


@pytest.mark.parametrize("quote", ["", "'"])
def test_folders_at_home(quote: str, cli: Any, tmp_path: Path) -> None:
    images(tmp_path / "photos")
    home = {"HOME": str(tmp_path)}
    data = ("data=imagefolder", f"data.root={quote}~/photos{quote}", "trainer.batch_size=4", "ladder=none")
    ended = cli(*MODEL, *data, f"output_dir={quote}~/mine{quote}", env=home)
    assert ended.code == 0, ended.text
    assert result(tmp_path / "mine")["outcome"] == "trained"
    again = cli(f"resume={quote}~/mine/checkpoints/last.pt{quote}", "trainer.epochs=2", "hydra.run.dir=out", env=home)
    assert again.code == 0, again.text
    assert result(tmp_path / "out")["metrics"]["epoch"] == 2


# -- bad input: exit code 2 and one clear message

LADDER_WITH_MISTAKES = """
rungs:
  - {name: one, overrides: [trainer.nothing=1, data.image_size=big]}
  - {name: two, overrides: [optimizer.speed=3]}
"""
BAD_INPUT = [
    ("optimized_metric=val_acc", ["optimized_metric=val_acc is none of val_accuracy, val_loss"]),
    ("trainer.batchsize=3", ["there is no setting trainer.batchsize; did you mean trainer.batch_size"]),
    ("+foo=1", ["there is no setting foo; --help lists them all"]),
    ("optimizer.kwargs.speed=1", ["write +optimizer.kwargs.speed="]),
    ("trainer.epochs=many", ["trainer.epochs=many is not a whole number"]),
    ("trainer.epochs=0", ["trainer.epochs=0 is below 1"]),
    ("trainer.batch_size=maximum", ["trainer.batch_size=maximum is neither a whole number above 0 nor max"]),
    ("ladder=nowhere", ["ladder/nowhere", "default", "exact", "faithful", "none"]),
    ("model.name=efficientnet_bo", ["model.name=efficientnet_bo", "did you mean efficientnet_b"]),
    ("model.name=torchvision/resnet19", ["torchvision/resnet18"]),
    ("model.name=resnet18.foo", ["unknown model.name=resnet18.foo", "did you mean resnet18."]),
    ("model.name=", ["unknown model.name=: there are", "such as"]),
    ("optimizer.momentum=2", ["optimizer.momentum=2.0 is not below 1"]),
    ("+sweep=lr", ["a sweep (optimizer.lr=", "runs with -m"]),
    ("+model.kwargs.speed=3", ["model.kwargs={'speed': 3}"]),
    ("model.name=vit_tiny_patch16_224", ["refuses data.image_size=32", "224"]),
    ("optimizer.name=adamm", ["optimizer.name=adamm", "did you mean adam"]),
    ("schedule.name=cosin", ["schedule.name=cosin", "cosine"]),
    ("trainer.batch_size=25", ["trainer.batch_size=25", "24 samples"]),
    ("trainer.batch_size=1", ["trainer.batch_size=1", "BatchNorm", "2 or more"]),
    ("trainer.micro_batch_size=1", ["trainer.micro_batch_size=1", "BatchNorm", "2 or more"]),
    ("memory.limit=5", ["memory.limit=5", "5600MiB"]),
    ("memory.limit=big", ["memory.limit='big'", "5600MiB", "none"]),
    ("device=cuda:9", ["device=cuda:9", "CUDA cards", "device=auto"]),
    ("device=gpu", ["device=gpu", "cuda:N"]),
    ("device=meta", ["device=meta: nothing is trained on meta devices", "use auto, cpu, cuda"]),
    ("seed=99999999999999999999", ["seed=99999999999999999999 is no whole number from"]),
    ("schedule.min_lr=-1", ["schedule.min_lr=-1.0 is below 0"]),
    ("schedule.min_lr=1", ["schedule.min_lr=1.0 is above optimizer.lr=0.001"]),
    ("schedule.warmup_epochs=40", ["schedule.warmup_epochs=40.0 is above trainer.epochs="]),
    ("card=null", ["Config group override must be", "leave it out"]),
    ("data.train._target_=nowhere.Images", ["nowhere.Images"]),
    ("data.crop_scale=[2,1]", ["data.crop_scale", "0 < least <= most <= 1"]),
    ("output_dir=/dev/null", ["record of this run in /dev/null", "File exists", "Choose another output_dir"]),
    ("resume=nowhere.pt", ["no checkpoint nowhere.pt"]),
    ("optimizer.lr=1e30", ["loss is nan", "optimizer.lr"]),
]


@pytest.mark.parametrize(("override", "said"), BAD_INPUT, ids=[override for override, _ in BAD_INPUT])
def test_bad_input(override: str, said: list[str], cli: Any) -> None:
    ended = cli(*NO_LADDER, override)
    assert ended.code == 2, ended.text
    assert all(text in message(ended) for text in said), ended.text
    assert "Traceback" not in ended.text
    assert ended.out.count("[ERROR]") + bool(ended.err) == 1  # one message


def test_names_on_rungs_are_known_before_training_begins(cli: Any, tmp_path: Path) -> None:
    rungs = [
        ("one", "model.name=mobilnetv3_small_050"),
        ("two", "trainer.batch_size=4"),
        ("three", "optimizer.name=sgdd"),
    ]
    text = "".join(f"  - {{name: {name}, overrides: [{override}]}}\n" for name, override in rungs)
    ended = cli("--config-dir", own_ladder(tmp_path, f"rungs:\n{text}"), *SMALL, "ladder=own")
    assert ended.code == 2
    said = message(ended)
    assert "rung 'one': unknown model.name=mobilnetv3_small_050: did you mean mobilenetv3_small_050" in said
    assert "rung 'three': unknown optimizer.name=sgdd: did you mean sgd" in said
    assert "rung 'two'" not in said
    assert not (tmp_path / "out" / "attempts.jsonl").exists()


def test_a_key_that_rungs_do_not_have(cli: Any, tmp_path: Path) -> None:
    ended = cli("--config-dir", own_ladder(tmp_path, "rungs: [{name: one, override: [seed=1]}]"), *SMALL, "ladder=own")
    assert ended.code == 2
    assert "In 'ladder/own': there is no 'override'; allowed are name, overrides" in ended.text


def test_a_limit_too_small_for_the_weights(cli: Any) -> None:
    ended = cli(*NO_LADDER, "memory.limit=2MiB")
    assert ended.code == 3
    assert "requested: oom in building the model" in message(ended)
    assert "a larger memory.limit" in message(ended)
    assert "ladder=exact" not in message(ended)  # which keeps the network


def own_ladder(folder: Path, text: str) -> str:
    """A ladder of the user's own, `own`, in a folder for `--config-dir`."""
    (folder / "mine" / "ladder").mkdir(parents=True)
    (folder / "mine" / "ladder" / "own.yaml").write_text(text)
    return "mine"


def test_all_mistakes_of_a_ladder_at_once(cli: Any, tmp_path: Path) -> None:
    ended = cli("--config-dir", own_ladder(tmp_path, LADDER_WITH_MISTAKES), *SMALL, "ladder=own")
    assert ended.code == 2
    assert "Traceback" not in ended.text
    said = ("'one'", "trainer.nothing", "data.image_size=big", "'two'", "optimizer.speed")
    assert all(text in message(ended) for text in said)
    assert not (tmp_path / "out" / "attempts.jsonl").exists()


@pytest.mark.parametrize(
    ("classes", "count", "said"),
    [
        (None, 0, "is no folder"),
        ("", 0, "no class folders"),
        ("a", 3, "one class folder, a"),
        ("ab", 0, "no images in a, b"),
    ],
)
def test_image_folders(classes: str | None, count: int, said: str, cli: Any, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    if classes is not None:
        root.mkdir()
        images(root, classes, count)
    ended = cli(*MODEL, "ladder=none", "trainer.batch_size=4", "data=imagefolder", "data.root=photos")
    assert ended.code == 2
    assert "photos" in message(ended)
    assert said in message(ended)
    assert "Traceback" not in ended.text


def test_no_image_folder_given(cli: Any) -> None:
    ended = cli(*MODEL, "ladder=none", "data=imagefolder")
    assert ended.code == 2
    assert "data.root=FOLDER" in message(ended)


def test_a_folder_that_nothing_uses(cli: Any) -> None:
    ended = cli(*MODEL, "data.root=photos")
    assert ended.code == 2
    assert "data.root=photos is named" in message(ended)
    assert "data=imagefolder" in message(ended)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(workers: int, cli: Any, tmp_path: Path) -> None:
    root = images(tmp_path / "photos" / "train")
    images(tmp_path / "photos" / "val", count=2)
    (root / "b" / "3.png").write_bytes(b"\x89PNG and no more")
    args = (*MODEL, "ladder=none", "trainer.batch_size=4", "data=imagefolder", "data.root=photos")
    ended = cli(*args, f"data.num_workers={workers}")
    assert ended.code == 2
    assert "photos/train/b/3.png cannot be read" in message(ended)
    assert "data.on_error=skip" in message(ended)
    assert "Traceback" not in ended.text
    assert cli(*args, "data.on_error=skip", "trainer.epochs=2").code == 0
    kept, broken = result(tmp_path / "out")["events"]
    assert kept.endswith("is kept in earlier-1")
    assert broken == "1 broken image is left out: photos/train/b/3.png"


def test_images_that_are_all_broken(cli: Any, tmp_path: Path) -> None:
    root = images(tmp_path / "photos")
    for path in root.glob("*/*.png"):
        path.write_bytes(b"\x89PNG and no more")
    settings = ("trainer.batch_size=4", "data=imagefolder", "data.root=photos", "data.on_error=skip")
    ended = cli(*MODEL, "ladder=none", *settings)
    assert ended.code == 2
    assert "no image of the training set can be read" in message(ended)


def test_nan_under_fp16_names_its_rung(cli: Any, tmp_path: Path) -> None:
    rungs = "rungs: [{name: half, overrides: [trainer.precision=fp16, trainer.batch_size=8]}]"
    ended = cli(
        "--config-dir",
        own_ladder(tmp_path, rungs),
        *SMALL,
        "ladder=own",
        *HALVED,
        "optimizer.lr=1e30",
        "trainer.epochs=4",
    )
    assert ended.code == 2
    assert "rung 'half' trains in it: try trainer.precision=bf16" in message(ended), ended.text


def test_the_whole_traceback_on_request(cli: Any) -> None:
    ended = cli(*NO_LADDER, "trainer.epochs=0", env={"HYDRA_FULL_ERROR": "1"})
    assert ended.code not in (0, 3, 4, 75)
    assert "Traceback" in ended.err
    assert "ConfigError: trainer.epochs=0 is below 1" in ended.err


# -- the other exit codes


def test_the_largest_batch(cli: Any, tmp_path: Path) -> None:
    ended = cli(*NO_LADDER, "trainer.batch_size=max", "memory.limit=28MiB", "trainer.epochs=1")
    assert ended.code == 0, ended.text
    written = result(tmp_path / "out")
    size = written["used"]["batch_size"]
    assert (written["requested"]["batch_size"], written["rung"]) == (size, "requested")
    outcomes = {attempt["rung"]: attempt["outcome"] for attempt in written["attempts"]}
    assert (outcomes[f"max-{size}"], outcomes[f"max-{size + 1}"]) == ("fits", "oom")
    assert f"batch size max -> {size}: {size} is proven and {size + 1} ran out of memory in 28 MiB" in ended.text
    assert f"rule for batch size 24 -> {size}" in ended.text
    again = cli("resume=auto", "trainer.epochs=2", "hydra.run.dir=out")
    assert again.code == 0, again.text
    assert result(tmp_path / "out")["used"]["batch_size"] == size
    assert f"batch size max -> {size}: found when the run began" in again.text
    assert f"rung max-{size}" not in again.text


def test_an_exhausted_ladder(cli: Any, tmp_path: Path) -> None:
    ended = cli(*SMALL, "memory.limit=11MiB", "trainer.batch_size=24")
    assert ended.code == 3
    assert "Traceback" not in ended.text
    text = message(ended)
    tried = result(tmp_path / "out")["attempts"]
    assert len(tried) == 9
    foretold = [entry for entry in tried if entry["outcome"] == "skipped" and entry["predicted_bytes"]]
    assert all(f"  {entry['rung']}: {entry['outcome']}" in text for entry in tried if entry not in foretold)
    names = ", ".join(entry["rung"] for entry in foretold)
    needs = ", ".join(f"{entry['predicted_bytes'] / 2**20:.0f}" for entry in foretold)
    assert f"  predicted not to fit: {names} ({needs} MiB)\n" in text
    assert "peak" in text
    assert all(t in text for t in ("capacity: a simulated card of 11 MiB", "no other process", "what to try"))
    assert result(tmp_path / "out")["outcome"] == "exhausted"
    enough = re.search(r"a larger memory\.limit \((\d+) MiB are predicted to do for rung ([\w-]+)\), closing", text)
    assert enough is not None, text
    ended = cli(*SMALL, f"memory.limit={enough[1]}MiB", "trainer.batch_size=24")
    assert (ended.code, result(tmp_path / "out")["rung"]) == (0, enough[2])


def test_an_unusable_device(cli: Any, tmp_path: Path) -> None:
    """The text of a device-side assert, raised where training meets it."""
    (tmp_path / "broken_card.py").write_text(BROKEN_CARD)
    ended = cli(*MODEL, "ladder=none", "trainer.batch_size=4", "data.train._target_=broken_card.Images")
    assert ended.code == 4, ended.text
    assert "the device is unusable after: CUDA error: device-side assert triggered" in message(ended)
    assert "What was saved is in" in message(ended)
    assert "Traceback" not in ended.text


def test_a_signal_saves_and_asks_to_be_run_again(launcher: Launcher, tmp_path: Path) -> None:
    process = launcher.start(*NO_LADDER, "trainer.epochs=500", "data.train.size=240", folder=tmp_path)
    wait_for(tmp_path, "out/metrics.csv")
    os.kill(process.pid, signal.SIGTERM)
    ended = process.wait()
    assert ended.code == 75
    assert "stopped by SIGTERM after update" in message(ended)
    assert re.search(r"(?m)^go on with python -m adaptive_trainer resume=auto output_dir=\S*out$", message(ended))
    assert "Traceback" not in ended.text
    assert result(tmp_path / "out")["outcome"] == "interrupted"


# -- what can go wrong outside


def test_a_full_disk_keeps_the_last_good_checkpoint(cli: Any, tmp_path: Path) -> None:
    """The first checkpoint (weights, 2.4 MB) can be written, the next one (with Adam's state, 7 MB) cannot."""
    ended = cli(*NO_LADDER, largest_file=4_000_000)
    assert ended.code == 2
    assert "Traceback" not in ended.text
    said = ("out/checkpoints/last.pt: the disk is full", "the last good one is kept", "Free some disk space")
    assert all(text in message(ended) for text in said), ended.text
    kept = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["best.pt", "last.pt"]
    load_model(kept / "best.pt")
    again = cli(*NO_LADDER, "resume=auto")
    assert again.code == 0
    assert "resumed at epoch 1, update 0" in message(again)


def test_a_disk_that_was_full_from_the_start(cli: Any, tmp_path: Path) -> None:
    ended = cli(*NO_LADDER, largest_file=100_000)
    assert ended.code == 2
    assert "there is no earlier one" in message(ended)
    assert "Traceback" not in ended.text
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_killed_data_workers_cost_workers_and_no_rung(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(KILLS_ITS_WORKER)
    data = ("data.train._target_=deadly.Images", "data.val=null", "data.num_workers=4", "trainer.batch_size=4")
    ended = cli(*MODEL, *data)
    assert ended.code == 0, ended.text
    record = result(tmp_path / "out")
    assert [entry["outcome"] for entry in record["attempts"]] == ["fits"]
    assert [event for event in record["events"] if "->" in event] == [
        "data.num_workers 4 -> 2",
        "data.num_workers 2 -> 0",
    ]
    assert sum("fewer workers, the same samples again" in event for event in record["events"]) == 2


# -- ladders, presets, stages, sweeps


def test_a_ladder_of_ones_own(cli: Any, tmp_path: Path) -> None:
    """A rung may set any key, add one, or choose from a group."""
    rungs = "rungs: [{name: mine, overrides: [optimizer=sgd, +model.kwargs.drop_rate=0.3, trainer.batch_size=12]}]"
    ended = cli("--config-dir", own_ladder(tmp_path, rungs), *SMALL, "ladder=own", *HALVED)
    assert ended.code == 0, ended.text
    record = result(tmp_path / "out")
    assert record["rung"] == "mine"
    assert (record["used"]["optimizer"], record["used"]["batch_size"]) == ("sgd", 12)
    why = "rung mine is used; out of memory: requested"
    assert {"key": "model.kwargs.drop_rate", "asked": None, "used": 0.3, "why": why} in record["changes"]
    assert "model.kwargs" not in [change["key"] for change in record["changes"]]


@pytest.mark.parametrize(("preset", "image", "batch"), [("minimum", 192, 8), ("maximum", 224, 24)])
def test_presets(preset: str, image: int, batch: int, cli: Any, tmp_path: Path) -> None:
    args = (arg for arg in MODEL if not arg.startswith("data."))
    ended = cli(*args, *FAKE, "ladder=none", f"preset={preset}", "data.num_workers=0")
    assert ended.code == 0, ended.text
    used = result(tmp_path / "out")["used"]
    assert (used["image_size"], used["batch_size"]) == (image, batch)


def test_stages(cli: Any, tmp_path: Path) -> None:
    args = [arg for arg in MODEL if not arg.startswith("data.")]
    ended = cli(*args, *FAKE, "phases=staged", "ladder=none", "data.val.size=2")
    assert ended.code == 0, ended.text
    stages = result(tmp_path / "out")["stages"]
    assert [stage["name"] for stage in stages] == ["smoke-test", "balanced", "full"]
    assert [stage["metrics"]["epoch"] for stage in stages] == [5, 10, 1]
    assert [stage["metrics"]["updates"] for stage in stages] == [15, 20, 1]
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == [*"0" * 5, *"1" * 10, "2"]
    assert float(rows[5]["train_loss"]) < float(rows[0]["train_loss"])  # what was learned is carried on


def test_a_sweep(cli: Any, tmp_path: Path) -> None:
    """Jobs in one process do not change each other: each comes to what it comes to alone."""
    sweep = ("hydra.sweep.dir=sweep", "+hydra.callbacks.note._target_=note.Note")
    (tmp_path / "note.py").write_text(
        "class Note:\n"
        "    def on_job_end(self, config, job_return, **kwargs):\n"
        "        open('values', 'a').write(f'{job_return.return_value}\\n')\n"
    )
    ended = cli(
        "-m", *SMALL, *HALVED, *sweep, "optimizer.lr=1e-3,3e-4", "ladder=default,none", "optimized_metric=val_loss"
    )
    assert ended.code == 3, ended.text  # without a ladder it does not fit; the other jobs go on
    records = [result(tmp_path / "sweep" / str(number)) for number in range(4)]
    assert [record["outcome"] for record in records] == ["trained", "exhausted"] * 2
    assert [record["used"]["lr"] < 3e-4 for record in records[::2]] == [False, True]
    values = (tmp_path / "values").read_text().split()
    assert values[::2] == [str(record["metrics"]["val_loss"]) for record in records[::2]]
    assert values[1::2] == ["None", "None"]
    alone = cli(*SMALL, *HALVED, "optimizer.lr=3e-4")
    assert alone.code == 0
    same = result(tmp_path / "out")["metrics"]
    timeless = same.keys() - {"seconds"}
    assert {key: same[key] for key in timeless} == {key: records[2]["metrics"][key] for key in timeless}


@pytest.mark.parametrize(
    ("sweep", "key", "values"), [("lr", "lr", [1e-3, 3e-4, 1e-4]), ("ladders", "batch_size", [8, 8])]
)
def test_ready_sweeps(sweep: str, key: str, values: list[float], cli: Any, tmp_path: Path) -> None:
    ended = cli("-m", *SMALL, f"+sweep={sweep}", "hydra.sweep.dir=sweep")
    assert ended.code == 0, ended.text
    jobs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [result(job)["used"][key] for job in jobs] == values


def test_a_sweep_with_an_output_dir_for_each_job(cli: Any, tmp_path: Path) -> None:
    ended = cli("-m", *NO_LADDER, "hydra.sweep.dir=sweep", "seed=1,2", "output_dir='all/${hydra:job.num}'")
    assert ended.code == 0, ended.text
    assert [result(tmp_path / "all" / n)["outcome"] for n in "01"] == ["trained", "trained"]
    ended = cli("-m", *NO_LADDER, "hydra.sweep.dir=sweep", "seed=1,2", "output_dir=one,two")
    assert ended.code == 0, ended.text
    assert [result(tmp_path / name)["outcome"] for name in ("one", "two")] == ["trained", "trained"]


def test_a_signal_ends_a_sweep(launcher: Launcher, tmp_path: Path) -> None:
    sweep = ("hydra.sweep.dir=sweep", "optimizer.lr=1e-3,1e-4", "trainer.epochs=500", "data.train.size=240")
    process = launcher.start("-m", *NO_LADDER, *sweep, folder=tmp_path)
    wait_for(tmp_path, "sweep/0/metrics.csv")
    os.kill(process.pid, signal.SIGTERM)
    ended = process.wait()
    assert ended.code == 75, ended.text
    assert not (tmp_path / "sweep" / "1").exists()


def test_lists_in_a_sweep_are_a_job_each(cli: Any, tmp_path: Path) -> None:
    settings = ("task=memory", "card=t4", "model.name=mobilenetv3_small_050", "batch=2,4", "size=32")
    ended = cli("-m", *settings, "hydra.sweep.dir=sweep")
    assert ended.code == 0, ended.text
    tables = [(tmp_path / "sweep" / n / "memory.csv").read_text().splitlines()[1:] for n in "01"]
    assert [[row.split(",")[0] for row in rows] for rows in tables] == [["2"], ["4"]]


def test_a_ladder_that_is_no_yaml(cli: Any, tmp_path: Path) -> None:
    ended = cli("--config-dir", own_ladder(tmp_path, "rungs: [{name: half, overrides: ["), *SMALL, "ladder=own")
    assert ended.code == 2
    assert "own.yaml" in ended.text
    assert "Traceback" not in ended.text


def test_a_ladder_that_is_no_text(cli: Any, tmp_path: Path) -> None:
    own = own_ladder(tmp_path, "")
    (tmp_path / own / "ladder" / "own.yaml").write_bytes(b"\xff\xfe\x00")
    ended = cli("--config-dir", own, *SMALL, "ladder=own")
    assert ended.code == 2
    assert "a YAML file cannot be read: 'utf-8' codec can't decode" in ended.text
    assert "Traceback" not in ended.text


def test_a_users_mistake_does_not_end_a_sweep(cli: Any, tmp_path: Path) -> None:
    ended = cli("-m", *NO_LADDER, "hydra.sweep.dir=sweep", "trainer.batch_size=25,8")
    assert ended.code == 2
    assert "Traceback" not in ended.text
    assert [result(tmp_path / "sweep" / n)["outcome"] for n in "01"] == ["failed", "trained"]


def test_every_job_of_a_sweep_leaves_a_result(cli: Any, tmp_path: Path) -> None:
    """Those with a bad value too, whenever it is seen to be one."""
    ended = cli("-m", *NO_LADDER, "hydra.sweep.dir=sweep", "trainer.batch_size=0,8", "model.name=nosuch,test_resnet")
    assert ended.code == 2
    outcomes = [result(tmp_path / "sweep" / n) for n in "0123"]
    assert [each["outcome"] for each in outcomes] == ["failed", "failed", "failed", "trained"]
    assert "trainer.batch_size=0 is neither" in outcomes[0]["message"]


def test_what_a_sweep_sweeps_is_not_typed_as_well(cli: Any, tmp_path: Path) -> None:
    for typed in ("optimizer.lr=0.5", "optimizer.lr=1,2", "++optimizer.lr=1"):
        ended = cli("-m", *NO_LADDER, "+sweep=lr", typed, "hydra.sweep.dir=sweep")
        assert ended.code == 2
        assert f"{typed} is typed, and +sweep=... sweeps optimizer.lr; leave one of them out" in ended.text
    assert not (tmp_path / "sweep" / "0").exists()


def test_ctrl_c_while_torch_is_imported_leaves_the_settings(tmp_path: Path) -> None:
    lines = ["import signal", "signal.signal(signal.SIGINT, signal.default_int_handler)"]
    (tmp_path / "torch.py").write_text("\n".join([*lines, "signal.raise_signal(signal.SIGINT)"]))
    assert python_m("-m", "adaptive_trainer", *NO_LADDER, "output_dir=mine", cwd=tmp_path).returncode == 130
    (tmp_path / "torch.py").unlink()
    again = python_m("-m", "adaptive_trainer", "resume=auto", "output_dir=mine", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "mine")["used"]["model"] == "mobilenetv3_small_050"
    assert "has left no checkpoint" in result(tmp_path / "mine")["events"][0]


def test_no_half_of_a_file_stays_on_a_full_disk(cli: Any, tmp_path: Path) -> None:
    assert cli(*NO_LADDER, largest_file=10).code != 0
    assert list(tmp_path.rglob("*.part")) == []


def test_what_changed_names_the_rung_that_is_used_and_what_became_of_those_above(cli: Any, tmp_path: Path) -> None:
    assert cli(*SMALL, *HALVED).code == 0
    [why] = [change["why"] for change in result(tmp_path / "out")["changes"] if change["key"] == "trainer.batch_size"]
    assert re.fullmatch(r"rung batch-\d+ is used; (out of memory|predicted not to fit): requested.*", why)
