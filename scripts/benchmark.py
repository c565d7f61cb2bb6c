"""Run the benchmarks and put their tables, and a plot, into docs/benchmarks.md.

speed: images per second against other trainers. command: seconds from a command to its first update, and to its end.
finders-CAP: seconds until a batch size fits and trains. data: images per second from files. where: what one update
spends its time on. undo, loop, compile: what transactions, the training loop and torch.compile cost and bring. layout,
start: where channels_last pays, and what it costs at first. offload: what recomputed and offloaded activations save and
cost. cpu: an update without a card.

Usage: python scripts/benchmark.py [PART ...] [--page FILE]

Every part runs in processes of its own, with nothing beside it. Between `<!-- PART -->` and `<!-- end of PART -->` of
the page its tables take the place of those of the last run. A part that fails leaves the page as it is.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, list[str]] = {
    "speed": ["scripts.benchmark_speed"],
    "command": ["scripts.benchmark_start"],
    "finders-2600": ["scripts.benchmark_finders", "--caps", "2600"],
    "finders-1300": ["scripts.benchmark_finders", "--caps", "1300"],
    "finders-900": ["scripts.benchmark_finders", "--caps", "900"],
    "data": ["scripts.benchmark_data"],
    "where": ["scripts.benchmark_where"],
    "undo": ["scripts.benchmark_update", "undo"],
    "loop": ["scripts.benchmark_update", "loop"],
    "compile": ["scripts.benchmark_update", "compile"],
    "layout": ["scripts.benchmark_update", "layout"],
    "start": ["scripts.benchmark_update", "start"],
    "edge": ["scripts.benchmark_edge"],
    "offload": ["scripts.benchmark_offload"],
    "cpu": ["scripts.benchmark_update", "cpu"],
}


def run(command: list[str]) -> str | None:
    """What a part prints, shown as it comes; None where it fails."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)
    return None if process.returncode else "".join(lines).strip()


def placed(page: str, part: str, tables: str) -> str:
    """The page with the tables between the part's marks, or at its end where it has none."""
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    new = f"{begin}{tables}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{new}"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: new, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the plot goes beside it")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(PARTS)}")
    page, failed = arguments.page.resolve(), []
    for part in arguments.parts or PARTS:
        plot = ["--plot", str(page.with_suffix(".png"))] if part == "speed" else []
        tables = run([*PARTS[part], *plot])
        if tables is None:
            failed.append(part)
            continue
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        page.write_text(placed(text, part, tables), encoding="utf-8")
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}; the page keeps what it had of them")


if __name__ == "__main__":
    main()
