"""Make the pictures in docs/pictures: the terminal, the report on a desk and on a phone, the notebook.

    python -m pip install --group pictures    # a terminal without a screen, notebooks as pages
    python scripts/pictures.py                # two minutes; needs Chromium

Everything is real: a training in a terminal of 80 columns, its report.html, the quick start as a kernel executes it.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINES = 80, 120
# small enough for a minute on a CPU, and for a card on which the first rungs do not fit
RUN = (
    "python -m adaptive_trainer model.name=mobilenetv3_small_050 data.image_size=64 trainer.batch_size=64 "
    "trainer.epochs=4 memory.limit=48MiB output_dir=run"
)
REPORTS = {"report-1440": (1440, 1500), "report-375": (375, 1535)}  # pixels: width and height
NOTEBOOK = (1180, 3030)  # as far as the plots
FONT_SIZE, MARGIN = 20, 24
COLOURS = {"default": "#e2e8f0", "brown": "#ecc94b", "red": "#fc8181"}  # pyte calls yellow brown
MOST_BYTES = 300_000


def main() -> None:
    """Make all pictures, and say how large they are."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        under_way, at_the_end = in_terminal(RUN, folder, r"epoch 3/4: [4-9]\d/")
        draw(under_way).save(PICTURES / "progress.png", optimize=True)
        draw(at_the_end).save(PICTURES / "terminal.png", optimize=True)
        for picture, size in REPORTS.items():
            photograph(folder / "run" / "report.html", PICTURES / f"{picture}.png", *size)
        page = folder / "notebook.html"
        page.write_text(as_page(ROOT / "docs" / "quickstart.ipynb", folder), encoding="utf-8")
        photograph(page, PICTURES / "notebook.png", *NOTEBOOK)
    for path in sorted(PICTURES.glob("*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")
        if path.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{path.name} has more than {MOST_BYTES // 1000} kB")


def in_terminal(command: str, folder: Path, moment: str) -> list[Any]:
    """Run a command in a terminal of its own; what is on it at a moment, and at the end.

    Args:
        moment: a regular expression of what is first read then.

    Returns:
        Twice the lines that are used: of each column its character, with `data`, `fg` and `bold`.
    """
    import pyte

    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {command}\r\n".encode())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PWD": str(folder), "TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""}
    typed = [sys.executable, *command.split()[1:]]
    process = subprocess.Popen(typed, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen: list[Any] = []
    with suppress(OSError):  # Linux says so when the other end is closed
        while read := os.read(ours, 4096):
            stream.feed(read)
            if not seen and re.search(moment, "\n".join(screen.display)):
                seen.append(_lines(screen))
    if process.wait():
        raise SystemExit("\n".join(screen.display))
    return [*seen, _lines(screen)]


def _lines(screen: Any) -> list[list[Any]]:
    lines = [[screen.buffer[row][column] for column in range(COLUMNS)] for row in range(LINES)]
    while not "".join(character.data for character in lines[-1]).strip():
        lines.pop()
    return lines


def draw(lines: list[list[Any]]) -> Image.Image:
    """Draw what is on a terminal."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    plain, bold = (ImageFont.truetype(fonts / f"DejaVuSansMono{kind}.ttf", FONT_SIZE) for kind in ("", "-Bold"))
    wide, high = round(plain.getlength("m")), round(1.3 * FONT_SIZE)
    size = (COLUMNS * wide + 2 * MARGIN, len(lines) * high + 2 * MARGIN)
    picture = Image.new("RGB", size, "#1a202c")
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            place = (MARGIN + column * wide, MARGIN + row * high)
            pen.text(place, character.data, COLOURS[character.fg], bold if character.bold else plain)
    return picture.quantize(64)  # a quarter of the bytes


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Open a page in Chromium and take a picture of its first pixels."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("there is no Chromium here")
    frame = page.with_name("frame.html")  # a window is never as narrow as a phone
    frame.write_text(
        f'<body style="margin:0"><iframe src="{page.name}" style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    window = f"--window-size={max(width, 600)},{height + 200}"
    subprocess.run(
        [browser, *flags, window, f"--screenshot={picture}", frame.as_uri()], check=True, capture_output=True
    )
    with Image.open(picture) as whole:
        shown = whole.convert("RGB").crop((0, 0, width, height))
    shown.quantize(255, dither=Image.Dither.NONE).save(picture, optimize=True)  # half of the bytes


def as_page(path: Path, folder: Path) -> str:
    """Execute a notebook in a folder, and return it as HTML."""
    import nbclient
    import nbformat
    from nbconvert import HTMLExporter

    # the kernel's; a library warns where widgets are not installed
    os.environ |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore:IProgress not found"}
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        allow_errors=True,  # one cell runs out of memory on purpose
        coalesce_streams=True,  # of a line of progress what is left in the end
    ).execute()
    page: str = HTMLExporter().from_notebook_node(notebook)[0]
    return page


if __name__ == "__main__":
    main()
