"""Speed of ConViT next to the same network with plain attention, and next to timm's models.

    python -m benchmarks.model [--models=convit_tiny@224,...] [--batch=16,...] [--rounds=5] [--seconds=2]
        [--programs=convit,plain,...] [--peer=PYTHON] [--other=DIR] [--fresh] [--minutes=M] [--json=FILE]

"plain" has the same blocks, tokens, heads and sizes, with the GPSA of the first ten blocks replaced by the
plain self-attention of the last two; "convit: ..." are ConViT with one thing done in another way
(benchmarks/model_jax.py). PYTHON has PyTorch and timm. DIR is another checkout of this repository, for
before and after. Every program is a process of its own; they take turns, and a ratio is the median over the
rounds of the ratios of neighbouring turns. With --fresh a process lives for one turn only, for when the
device's memory does not hold all of them. What --minutes leave no time for is left out. The first of
--tasks compiles in an empty cache: its first step alone is cold.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TASKS = ("inference", "training")
PEERS = {  # program: (timm's model of a size, compiled)
    "timm convit": ("convit_{}", False),
    "timm convit compiled": ("convit_{}", True),
    "timm deit": ("deit_{}_patch16_224", False),
    "timm deit compiled": ("deit_{}_patch16_224", True),
}
OURS = ("convit", "plain")
WAYS = (  # ConViT in other ways
    "convit: cuDNN",
    "convit: position over heads only",
    "convit: position dense",
    "convit: unrolled",
    "convit: remat",
)
# What is asked for: task, numerator, denominator, least ratio of images/s on (CPU, GPU).
RATIOS = [
    ("inference", "convit", "plain", (0.95, 0.95)),
    ("training", "convit", "plain", (0.95, 0.95)),
    ("inference", "convit", "timm convit", (2, 3)),
    ("inference", "convit", "timm convit compiled", (2, 2)),
    ("training", "convit", "timm convit", (1.5, 3)),
    ("training", "convit", "timm convit compiled", (1.5, 2)),
    ("inference", "convit", "timm deit", None),
    ("training", "convit", "timm deit", None),
    ("inference", "convit", "other", None),
    ("training", "convit", "other", None),
    *((task, way, "convit", None) for way in WAYS for task in TASKS),
]
MEMORY, MFU, FIRST_STEP = 1.10, "40% (GPU, ConViT-S, batch 512)", "20 s, 5 s (CPU), 40 s, 8 s (GPU)"


@dataclasses.dataclass
class Program:
    """A process that answers requests, started when it is first asked."""

    name: str
    command: list
    environment: dict
    folder: str = str(ROOT)
    process: subprocess.Popen = None
    answers: dict = dataclasses.field(default_factory=lambda: {task: [] for task in (*TASKS, "peak")})

    def ask(self, task, seconds, deadline):
        """Keep the answer to a request. False if there is none: the reason is in `failed`."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        watch = threading.Timer(max(1, deadline - time.monotonic()), self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(f"{task} {seconds}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        watch.cancel()
        if not line.startswith("{"):
            return False
        self.answers[task].append(json.loads(line))
        return True

    def stop(self):
        """End the process; the next request starts another."""
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):  # it was killed
                self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def programs(model, image_size, batch, options, cache):
    """The programs to compare for one model, ours first."""
    size = model.removeprefix("convit_")
    arguments = [f"--model={model}", f"--image_size={image_size}", f"--batch={batch}"]
    ours = [sys.executable, "-P", str(ROOT / "benchmarks/model_jax.py"), *arguments]
    ours.append(f"--settings={options.settings}")

    def path(folder):
        return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))

    environment = {
        "PYTHONPATH": path(ROOT),
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # for the memory in use to be what is needed
    }
    result = [
        Program(name, [*ours, f"--program={name}"], environment)
        for name in (*OURS, *WAYS)
        if name in options.programs
    ]
    if options.other:  # this benchmark, that package
        there = {**environment, "PYTHONPATH": path(Path(options.other).resolve())}
        result.append(Program("other", [*ours, "--program=convit"], there))
    script = str(ROOT / "benchmarks/model_timm.py")
    for name in [name for name in PEERS if options.peer and name in options.programs]:
        model, compiled = PEERS[name]
        arguments[0] = f"--model={model.format(size)}"
        command = [options.peer, script, *arguments, *["--compile"] * compiled]
        result.append(Program(name, command, {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}))
    return result


def measure(running, options, deadline):
    """Ask all programs in turn; those that fail or for which no time is left are dropped, and named."""
    dropped = set()

    def ask(program, task, seconds):
        if program.name in dropped:
            return
        if time.monotonic() > deadline:
            dropped.add(program.name)
            print(f"  no time left for {program.name}, {task}", flush=True)
        elif not program.ask(task, seconds, deadline):
            dropped.add(program.name)
            print(f"  {program.name} gave no {task}", flush=True)
            program.stop()

    if not options.fresh:  # a first process each, which compiles and is not timed
        for program in running:
            for task in options.tasks:
                ask(program, task, 0)
            program.stop()
    for _ in range(options.rounds):
        ask(running[0], "peak", 0.5)
        if options.fresh:
            for program in running:
                for task in options.tasks:
                    ask(program, task, options.seconds)
                program.stop()
        else:
            for task in options.tasks:
                for program in running:
                    ask(program, task, options.seconds)
    for program in running:
        program.stop()


def summary(running, options):
    """{"rates": rows of the table, "ratios": ...} from the answers."""
    by_name = {program.name: program for program in running}

    def values(name, task, field):
        answers = by_name[name].answers[task] if name in by_name else []
        return [answer[field] for answer in answers if field in answer]

    peak = values(running[0].name, "peak", "flops")
    rows, ratios = [], []
    for task in options.tasks:
        for name in by_name:
            rates = values(name, task, "images_per_second")
            if not rates:
                continue
            row = {"task": task, "program": name, "images_per_second": statistics.median(rates)}
            first = values(name, task, "first_step")
            row["first_step_cold"] = first[0]
            row["first_step_warm"] = first[1] if len(first) > 1 else None
            row["first_step_processor"] = values(name, task, "first_step_processor")[:2]
            row["peak_mb"] = max(values(name, task, "peak_mb")[-options.rounds :])
            row["program_mb"] = next(iter(values(name, task, "program_mb")), None)
            macs = values(name, task, "macs")
            if macs and peak:
                flops = {"inference": 2, "training": 6}[task] * macs[0]
                row["gmacs"] = macs[0] / 1e9
                row["mfu"] = row["images_per_second"] * flops / statistics.median(peak)
            rows.append(row)
    for task, ours, theirs, least in RATIOS:
        row = {"task": task, "ratio": f"{ours} / {theirs}", "least": least}
        for field in ("images_per_second", "images_per_processor_second"):
            pairs = list(zip(values(ours, task, field), values(theirs, task, field), strict=False))
            if task in options.tasks and pairs:
                each = sorted(a / b for a, b in pairs)
                row[field] = statistics.median(each)
                row[f"{field}_range"] = [each[0], each[-1]]
        if "images_per_second" in row:
            ratios.append(row)
    memory = [values(name, "training", "program_mb") for name in ("convit", "plain")]
    if "training" in options.tasks and all(memory):
        ratios.append(
            {"task": "training", "ratio": "memory convit / plain", "value": memory[0][0] / memory[1][0]}
        )
    return {"peak_tflops": statistics.median(peak) / 1e12 if peak else None, "rates": rows, "ratios": ratios}


def show(found):
    """Print one model's tables."""
    if found["peak_tflops"]:
        print(f"  large matrix product: {found['peak_tflops']:.3g} TFLOP/s")
    gmacs = next(
        (f", {row['gmacs']:.4g} GMAC an image forward" for row in found["rates"] if "gmacs" in row), ""
    )
    print(f"  asked for: MFU {MFU}; first step of training, cold and warm, {FIRST_STEP}{gmacs}")
    print(f"  {'':42}images/s   MFU   first step cold, warm   peak MB   program MB")
    for row in found["rates"]:
        mfu = f"{row['mfu']:6.1%}" if "mfu" in row else "     -"
        warm = f"{row['first_step_warm']:6.1f} s" if row["first_step_warm"] is not None else "       -"
        needed = f"{row['program_mb']:10.0f}" if row["program_mb"] else "         -"
        print(
            f"  {row['task']:10}{row['program']:32}{row['images_per_second']:9.2f} {mfu}"
            f"{row['first_step_cold']:13.1f} s {warm}{row['peak_mb']:11.0f} {needed}"
        )
    for row in found["ratios"]:
        if "value" in row:
            print(f"  {row['task']:10}{row['ratio']:42}{row['value']:6.2f}; asked for: at most {MEMORY}")
            continue
        low, high = row["images_per_second_range"]
        least = (
            "" if row["least"] is None else f"; asked for: {row['least'][0]} (CPU), {row['least'][1]} (GPU)"
        )
        print(
            f"  {row['task']:10}{row['ratio']:42}{row['images_per_second']:6.2f} ({low:.2f} to {high:.2f}), "
            f"per processor time {row['images_per_processor_second']:.2f}{least}"
        )
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", default="convit_tiny@224,convit_small@224,convit_base@224,convit_small@448"
    )
    parser.add_argument("--batch", default="16,8,4,2", help="images a step, one number for each model")
    parser.add_argument("--tasks", default="inference,training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of a turn")
    parser.add_argument("--settings", default="{}", help='of the model, as \'{"dtype": "bfloat16"}\'')
    parser.add_argument("--peer", help="a Python with PyTorch and timm")
    parser.add_argument(
        "--programs",
        default=",".join((*OURS, *PEERS)),
        help="also " + ", ".join(map(repr, WAYS)),
    )
    parser.add_argument("--other", help="another checkout, compared as the program `other`")
    parser.add_argument("--fresh", action="store_true", help="a new process for each turn")
    parser.add_argument("--minutes", type=float, default=600, help="start nothing after so many")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    options.tasks, options.programs = options.tasks.split(","), options.programs.split(",")
    known = [*OURS, *PEERS, *WAYS]
    if unknown := set(options.programs) - set(known):
        parser.error(f"--programs has {', '.join(sorted(unknown))}: there are {', '.join(known)}.")
    if not set(options.programs) - {*PEERS}:
        parser.error("--programs has none of ours to compare with: add convit.")
    models, batches = options.models.split(","), [int(number) for number in options.batch.split(",")]
    if len(models) != len(batches):
        parser.error(f"--batch has {len(batches)} numbers for {len(models)} models: give one for each.")
    deadline = time.monotonic() + 60 * options.minutes
    results = {"command": " ".join(sys.argv), "models": {}}
    for entry, batch in zip(models, batches, strict=True):
        model, _, size = entry.partition("@")
        with tempfile.TemporaryDirectory() as cache:
            running = programs(model, int(size or 224), batch, options, cache)
            measure(running, options, deadline)
        found = summary(running, options)
        answers = {program.name: program.answers for program in running}
        device = next(
            (a["device"] for tasks in answers.values() for found_by in tasks.values() for a in found_by),
            "no device",
        )
        print(f"{entry}, batch {batch}, {options.rounds} rounds, {device}", flush=True)
        show(found)
        results["models"][entry] = {"batch": batch, "device": device, **found, "answers": answers}
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
