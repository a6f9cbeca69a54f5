"""Put the strips of edits and generations that the tiny presets made into README.md, with date and machine.

    python benchmarks/readme_strip.py                      # of the newest finished finetune-edit run
    python benchmarks/readme_strip.py runs/pretrain/NAME   # of that run, and say so

Run after every change of the tiny presets (`make readme-strip`); everything between the two markers is replaced.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURE = Path("docs/images/tiny-edits.png")
WORDS_PICTURE = Path("docs/images/tiny-words.png")
BEGIN, END = "<!-- strip: written by benchmarks/readme_strip.py -->", "<!-- end of strip -->"


def main() -> None:
    """Copy the picture and write the lines around it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finetune-edit or pretrain run")
    args = parser.parse_args()
    run = args.run or max((ROOT / "runs/finetune-edit").glob("*/heldout/strip.png")).parents[1]
    heldout = json.loads((run / "heldout.json").read_text())
    for strip, picture in (("strip.png", PICTURE), ("words.png", WORDS_PICTURE)):
        # 256 colours show what can be seen, in a third of the bytes.
        Image.open(run / "heldout" / strip).convert("RGB").quantize(256).save(ROOT / picture, optimize=True)
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), lines(run, heldout["summary"])))
    print(f"{PICTURE}, {WORDS_PICTURE} and README.md show {run}")


def lines(run: Path, summary: list[str]) -> str:
    """What stands between the markers."""
    made = datetime.date.fromtimestamp((run / "heldout/strip.png").stat().st_mtime)
    measured = "; ".join(summary)
    commands = "`make pretrain` alone" if run.parent.name == "pretrain" else "exactly these two commands"
    return (
        f"![Six held-out edits of the tiny preset: source, edited, target]({PICTURE.as_posix()})\n\n"
        f"Held-out edits, the first of each kind, after {commands} ({made.isoformat()}, {machine()}): "
        f"{measured}.\n\n"
        f"![Held-out captions drawn by the same model, and their targets]({WORDS_PICTURE.as_posix()})\n\n"
        "The same weights from words alone, the first captions of pictures and of clips.\n"
    )


def machine() -> str:
    """Cores and processor, in words."""
    cores = len(os.sched_getaffinity(0))
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{cores} cores of an {names[0] if names else platform.machine()}"


def replaced(text: str, content: str) -> str:
    """The page with other content between the markers.

    Raises:
        SystemExit: if the page lacks a marker.
    """
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md: has no {BEGIN} ... {END}")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + content + text[text.index(END) :]


if __name__ == "__main__":
    main()
