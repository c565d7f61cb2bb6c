"""A real Jupyter kernel runs out of memory in one cell, is cleared in the next, and trains in the third."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]

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


def output(cell: dict[str, list[dict[str, str]]]) -> str:
    return "".join(out.get("text", "") for out in cell["outputs"])


def test_out_of_memory_in_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "kernels" / "here"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.joinpath("kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    nbclient.NotebookClient(notebook, kernel_name="here", timeout=60).execute()
    cells = notebook.cells

    (error,) = cells[1]["outputs"]
    assert error["ename"] == "SimulatedOutOfMemory"
    assert "Tried to allocate 16 MiB" in error["evalue"]
    assert int(output(cells[2])) > 48 * 2**20
    cleared = output(cells[3]).splitlines()
    assert cleared[0].startswith("freed ")
    assert cleared[1] == "0 2097152"
    assert cleared[2].startswith("simulated card: total 64 MiB, allocated 1")
    assert output(cells[4]) == "trained True\n"
