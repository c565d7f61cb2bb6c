"""Notebooks in a real Jupyter kernel: the quick start of the docs, an out-of-memory that is cleared, an interrupt."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.forking import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

QUICK_START = ROOT / "docs" / "quickstart.ipynb"

CELLS = [
    # 0: a loop of one's own on a card of 64 MiB
    """
import torch
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.memory.usage import clear_gpu_memory, print_gpu_memory
torch.set_num_threads(1)
context = limited(torch.device("cpu"), "64MiB")
card = context.__enter__()
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
weights = sum(p.nbytes for p in model.parameters())
def step(rows):
    with card.device_work():
        x = torch.zeros(rows, 256)
        loss = model(x).square().mean()
        loss.backward()
    return x
step(8)
model.zero_grad()
""",
    # 1: does not fit; the error escapes
    "step(2**14)",
    # 2: a cell that works does not free it
    "1 + 1\nheld = card.usage().allocated\nprint(held)",
    # 3: clearing does
    "freed = clear_gpu_memory()\nprint(card.usage().allocated - weights, card.usage().reserved)\nprint_gpu_memory()",
    # 4: and training goes on
    "for _ in range(3): step(2**10)\nprint('trained', card.usage().peak_allocated <= card.bytes)",
]


def output(cell: Any) -> str:
    return "".join(out.get("text", "") for out in cell["outputs"])


def shown(cell: Any, kind: str) -> list[str]:
    """What a cell shows, of one kind, such as text/html."""
    return [out["data"][kind] for out in cell["outputs"] if kind in out.get("data", {})]


Execute = Callable[[Any], Any]


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Runs a notebook in a kernel of its own, whose folder is tmp_path; returns the cells of code."""
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.joinpath("kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(notebook: Any) -> Any:
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120, resources=resources).execute()
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    return run


def notebook_of(*sources: str, fails: int) -> Any:
    """A notebook, one of whose cells is to end with an error."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells[fails].metadata["tags"] = ["raises-exception"]
    return notebook


def test_out_of_memory_in_a_cell(execute: Execute) -> None:
    cells = execute(notebook_of(*CELLS, fails=1))

    (error,) = cells[1]["outputs"]
    assert error["ename"] == "SimulatedOutOfMemory"
    assert "Tried to allocate 16 MiB" in error["evalue"]
    assert int(output(cells[2])) > 48 * 2**20
    cleared = output(cells[3]).splitlines()
    assert cleared[0].startswith("freed ")
    assert cleared[1] == "0 2097152"
    assert cleared[2].startswith("simulated card: total 64 MiB, allocated 1")
    assert output(cells[4]) == "trained True\n"


INTERRUPTED = [
    """
import os, signal, threading, time
from pathlib import Path
from adaptive_trainer import Trainer, compose_config

def interrupt():  # as Jupyter does, once an epoch is over
    while not Path("out/metrics.csv").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
small = ["data=fakedata", "data.train.size=24", "data.val.size=8", "data.image_size=32", "data.num_workers=0"]
small += ["model.name=mobilenetv3_small_050", "trainer.epochs=1000", "report=false"]
Trainer(compose_config(small), output_dir="out").fit()
""",
    """
done = len(Path("out/metrics.csv").read_text().splitlines()) - 1
go_on = ["resume=auto", "output_dir=out", f"trainer.epochs={done + 1}"]
print(Trainer(compose_config(go_on)).fit().metrics["epoch"] - done)
""",
]


def test_an_interrupt_gives_two_lines(execute: Execute) -> None:
    stopped, went_on = execute(notebook_of(*INTERRUPTED, fails=0))
    error = next(out for out in stopped["outputs"] if out["output_type"] == "error")
    said = "\n".join(error["traceback"])
    assert re.fullmatch(
        r"stopped by SIGINT after update \d+, state saved\ngo on with resume=auto output_dir=\S+out", said
    )
    assert output(went_on).endswith("\n1\n")


def test_a_mistake_is_its_message(execute: Execute) -> None:
    mistake = "from adaptive_trainer import compose_config\ncompose_config(['trainr.epochs=3'])"
    everything = "import os\nos.environ['HYDRA_FULL_ERROR'] = '1'\n" + mistake
    notebook = notebook_of(mistake, everything, fails=0)
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    short, long = ([out["traceback"] for out in cell["outputs"]] for cell in execute(notebook))
    said = "ConfigError: there is no setting trainr.epochs; did you mean trainer.epochs?"
    assert short == [[said]]
    assert "\n".join(long[0]).startswith("Traceback")
    assert said in long[0][-1]


def test_the_quick_start_is_kept_without_outputs() -> None:
    notebook = nbformat.read(QUICK_START, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.slow
def test_the_quick_start(execute: Execute) -> None:
    plan, prediction, training, plots, fails, clears, own, uses = execute(nbformat.read(QUICK_START, as_version=4))
    assert "RTX 2060, 6144 MiB: lands on rung batch-16; requested may fit" in shown(plan, "text/html")[0]
    assert re.search(r"<td>\d+ MiB</td>", shown(prediction, "text/html")[0])
    assert re.search(r"epoch 1/2: \d+/90, ", output(training))  # progress
    (result,) = shown(training, "text/html")
    assert "<b>trained on rung batch-16</b>: mobilenetv3_small_050, batch 16, image 64" in result
    assert "<td>trainer.batch_size</td><td>64</td><td>16</td>" in result
    assert len(shown(plots, "image/png")) == 4
    assert fails["outputs"][-1]["ename"] == "SimulatedOutOfMemory"
    before, freed, step = output(clears).splitlines()
    assert before.startswith("simulated card: total 64 MiB, allocated 49 MiB")
    assert freed.startswith("freed 48 MiB; ")
    assert step.startswith("a smaller step: before 1028 KiB, peak 10 MiB")
    assert "<b>trained on rung requested</b>: Sequential" in shown(own, "text/html")[0]
    assert re.search(r"val accuracy (9\d|100)\.\d\d %", output(own))  # it can be learned
    assert "Prediction(path='runs/zero.png', classes=('0', " in output(uses)
    assert "('0', '1', '2', '3'," in output(uses)
