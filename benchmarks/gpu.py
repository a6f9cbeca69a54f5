"""Everything there is to measure on one GPU, in nine minutes: ``make bench-gpu``.

    python benchmarks/gpu.py [--output results.json] [--minutes 8.8] [--write-docs]

Needs torch, Triton and this checkout. Each part is a process of its own with its share of the time, so that one that
fails or hangs loses only itself:

- kernels: every Triton kernel against float64, and its share of the copy bandwidth (``gpu_kernels.py``);
- sample: guided denoising steps of the 5b model, by kernels, compilation and batching (``gpu_model.py``);
- train: forward and backward of the 5b model by recomputation and attention back end, MFU, peak memory beside the plan;
- encoders: Wan's VAE and Qwen3-VL as ``data prepare`` runs them, by layout, compilation, copies and packing
  (``gpu_encoders.py``; needs diffusers and transformers);
- deepspeed: a whole ZeRO-3 step of as many blocks as fit, where DeepSpeed is installed.

Writes JSON and, with ``--write-docs``, a table into ``docs/benchmarks.md``. ``--device cpu`` tries the script with tiny
sizes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
HEADING = "## One GPU: the 5B model"
# Seconds of each part of 540.
SHARES = {"kernels": 50, "train": 150, "sample": 100, "encoders": 160, "deepspeed": 80}


def commands(folder: Path, on_cpu: bool, limits: dict[str, float]) -> dict[str, tuple[list[str], Path]]:
    """The command line of each part and the JSON file it writes."""
    kernels = [str(HERE / "gpu_kernels.py"), "--output", str(folder / "kernels.json"), "--no-compile"]
    if on_cpu:
        kernels += ["--device", "cpu", "--tokens", "64", "--dim", "96", "--heads", "2", "--check-tokens", "32"]
        kernels += ["--repeats", "1"]
    else:
        kernels += ["--tokens", "9750", "--repeats", "20"]
    parts = {"kernels": (kernels, folder / "kernels.json")}
    target = folder / "encoders.json"
    command = [str(HERE / "gpu_encoders.py"), "--output", str(target)]
    command += ["--time-limit-s", str(max(limits["encoders"] - 40, 10))]
    parts["encoders"] = (command + (["--device", "cpu", "--quick"] if on_cpu else []), target)
    for part in ("train", "sample", "deepspeed"):
        target = folder / f"{part}.json"
        command = [str(HERE / "gpu_model.py"), "--output", str(target), "--only", part]
        # Building the model takes its part of the time too.
        command += ["--time-limit-s", str(max(limits[part] - 40, 10))]
        parts[part] = (command + (["--device", "cpu", "--model", "tiny", "--quick"] if on_cpu else []), target)
    return parts


def run(command: list[str], target: Path, limit_s: float, environment: dict[str, str] | None) -> dict:
    """What a part wrote, or why it did not."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], timeout=limit_s, capture_output=True, text=True, env=environment
        )
        problem = "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1] if done.stderr else "failed"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit_s:.0f} s; what it had measured is kept"
    content = json.loads(target.read_text()) if target.exists() else {}
    content["seconds"] = round(time.monotonic() - started, 1)
    return content | ({"problem": problem} if problem else {})


def table(results: dict) -> str:
    """The results as a section of ``docs/benchmarks.md``."""
    device = next((part["device"] for part in results.values() if "device" in part), "unknown device")
    lines = [
        HEADING,
        "",
        f"`make bench-gpu` on {device}; milliseconds are medians, MFU is model FLOPs over the peak.",
        "",
    ]
    lines += ["| step | variant | ms | MFU | peak GiB | planned GiB |", "|---|---|---|---|---|---|"]
    for part in ("train", "sample", "encoders", "deepspeed"):
        for row in results.get(part, {}).get("results", []):
            facts = ("kernels", "compiled", "checkpointing", "attention", "batch_branches", "blocks")
            facts += ("variant", "samples_together")
            variant = ", ".join(f"{name} {row[name]}" for name in facts if name in row)
            if "distance" in row:
                variant += f", {row['distance']:.1e} from the first"
            if "ms" not in row:
                lines.append(f"| {row['name']} | {variant} | {row.get('error') or row.get('skipped')} | | | |")
                continue
            numbers = [f"{row['ms']:.1f}", f"{row['mfu']:.0%}" if row.get("mfu", 0) == row.get("mfu", 0) else ""]
            numbers += [f"{row[name]:.1f}" if name in row else "" for name in ("peak_gib", "planned_gib")]
            lines.append(f"| {row['name']} | {variant} | {' | '.join(numbers)} |")
    checks = results.get("kernels", {}).get("correctness", [])
    right = sum(check["ok"] and check["reproducible"] for check in checks)
    lines += ["", f"Kernels against float64: {right} of {len(checks)} forms right, and the same bits twice."]
    lines += [f"{name}: {part['problem']}." for name, part in results.items() if "problem" in part]
    return "\n".join(lines) + "\n"


def write_section(page: Path, section: str) -> None:
    """Replace or append the section in a page."""
    text = page.read_text()
    before, found, rest = text.partition(HEADING)
    after = rest[rest.index("\n## ") + 1 :] if found and "\n## " in rest else ""
    page.write_text(before.rstrip() + "\n\n" + section + ("\n" + after if after else ""))


def main() -> None:
    """Run the parts one after the other, within the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark.json"))
    parser.add_argument("--minutes", type=float, default=8.8)
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--device", default="cuda", help="cpu: tiny sizes, to try the script itself")
    parser.add_argument("--write-docs", type=Path, nargs="?", const=PAGE, help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    folder = options.output.resolve().parent / "gpu-benchmark-parts"
    folder.mkdir(parents=True, exist_ok=True)
    scale = 60 * options.minutes / sum(SHARES[part] for part in options.parts)
    limits = {part: SHARES[part] * scale for part in SHARES}
    results = {}
    for name, (command, target) in commands(folder, options.device == "cpu", limits).items():
        if name in options.parts:
            target.unlink(missing_ok=True)
            results[name] = run(command, target, min(limits[name], max(deadline - time.monotonic(), 5)), None)
            options.output.write_text(json.dumps(results, indent=2))
            print(f"{name}: {results[name]['seconds']} s {results[name].get('problem', '')}", flush=True)
    section = table(results)
    print(section)
    if options.write_docs:
        write_section(options.write_docs, section)


if __name__ == "__main__":
    main()
