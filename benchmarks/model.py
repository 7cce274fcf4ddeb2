"""Speed of ConViT next to the same network with plain attention, and next to timm's models.

    python -m benchmarks.model [--models=convit_tiny@224,...] [--batch=16,...] [--rounds=5] [--seconds=2]
        [--programs=convit,plain,...] [--peer=PYTHON] [--other=DIR] [--fresh] [--minutes=M] [--json=FILE]

"plain" has the same blocks, tokens, heads and sizes, with the GPSA of the first ten blocks replaced by the
plain self-attention of the last two. Either may do things in other ways: "convit: cuDNN + unrolled"
(WAYS, benchmarks/model_jax.py). PYTHON has PyTorch and timm. DIR is another checkout of this repository, for
before and after. Every program is a process of its own; they take turns in the order of --programs, where one
may stand twice, and a ratio is the median over the rounds of the ratios of neighbouring turns. With --fresh
a process lives for one turn only, for when the device's memory does not hold all of them. What --minutes
leave no time for is left out, and named. Every turn is printed, and in the file, when it is done. All share
a folder of compiled programs that is empty at first; on a GPU strictly cold is only the first step of all,
since the next find there what was tuned for it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.model_table import TASKS, show, summary

ROOT = Path(__file__).parents[1]
PEERS = {  # program: (timm's model of a size, compiled)
    "timm convit": ("convit_{}", False),
    "timm convit compiled": ("convit_{}", True),
    "timm deit": ("deit_{}_patch16_224", False),
    "timm deit compiled": ("deit_{}_patch16_224", True),
}
OURS = ("convit", "plain")
WAYS = ("cuDNN", "position over heads only", "position dense", "unrolled", "remat")  # of doing one of ours


def known(program):
    """Whether there is such a program: one of ours, in some ways or none, or a peer."""
    base, colon, listed = program.partition(": ")
    ways = {*listed.split(" + ")} if colon else set()
    two_positions = "cuDNN" in ways and any(way.startswith("position") for way in ways)  # cuDNN has its own
    return program in PEERS or (base in OURS and ways <= {*WAYS} and not two_positions)


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
    """The programs to compare for one model: each of options.programs, once."""
    size = model.removeprefix("convit_")
    arguments = [f"--image_size={image_size}", f"--batch={batch}"]

    def path(folder):
        return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))

    def ours(name, program, folder):
        script = str(ROOT / "benchmarks/model_jax.py")
        command = [sys.executable, "-P", script, f"--model={model}", f"--program={program}", *arguments]
        environment = {
            "PYTHONPATH": path(folder),
            "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # for the memory in use to be what is needed
        }
        return Program(name, [*command, f"--settings={options.settings}"], environment)

    def peer(name):
        of_timm, compiled = PEERS[name]
        command = [options.peer, str(ROOT / "benchmarks/model_timm.py"), f"--model={of_timm.format(size)}"]
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        return Program(name, [*command, *arguments, *["--compile"] * compiled], environment)

    def program(name):
        if name == "other":  # this benchmark, that package
            return ours(name, "convit", Path(options.other).resolve())
        return peer(name) if name in PEERS else ours(name, name, ROOT)

    return [program(name) for name in dict.fromkeys(options.programs)]


def measure(running, options, deadline, keep):
    """Ask all programs in turn; those that fail or for which no time is left are dropped, and named.

    keep() is called after every turn that was timed.
    """
    dropped = set()
    by_name = {program.name: program for program in running}
    turns = [by_name[name] for name in options.programs]
    reference = next(program for program in running if program.name not in PEERS)

    def ask(program, task, seconds):
        if time.monotonic() > deadline:
            print(f"  no time left for {program.name}, {task}", flush=True)
        elif program.name not in dropped:
            if not program.ask(task, seconds, deadline):
                dropped.add(program.name)
                late = " in time" if time.monotonic() >= deadline else ""
                print(f"  {program.name} gave no {task}{late}", flush=True)
                program.stop()
            elif seconds:
                print(f"  {turn(program.name, task, program.answers[task][-1])}", flush=True)
                keep()

    if not options.fresh:  # a first process each, which compiles and is not timed
        for program in running:
            for task in options.tasks:
                ask(program, task, 0)
            program.stop()
    for _ in range(options.rounds):
        if options.fresh:
            for program in turns:
                for task in options.tasks:
                    ask(program, task, options.seconds)
                if program is reference:
                    ask(program, "peak", 0.5)  # last, to be no part of the memory in use
                program.stop()
        else:
            for task in options.tasks:
                for program in turns:
                    ask(program, task, options.seconds)
            ask(reference, "peak", 0.5)
    for program in running:
        program.stop()


def turn(name, task, answer):
    """One line on one answer."""
    if task == "peak":
        return f"large matrix product: {answer['flops'] / 1e12:.3g} TFLOP/s"
    first = f", first step {answer['first_step']:.1f} s" if "first_step" in answer else ""
    needed = f", {answer['program_mb']:.0f} MB" if "program_mb" in answer else ""
    return f"{task}: {name}: {answer['images_per_second']:.2f} images/s{first}{needed}"


def compare(entry, batch, options, deadline, results):
    """Measure one model and print its tables; results, and the file, have after every turn what is known."""
    model, _, size = entry.partition("@")

    def keep():
        answers = {program.name: program.answers for program in running}
        devices = [a["device"] for tasks in answers.values() for found in tasks.values() for a in found]
        device = next(iter(devices), "no device")
        found = {"batch": batch, "device": device, **summary(running, options), "answers": answers}
        results["models"][entry] = found
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1))
        return found

    with tempfile.TemporaryDirectory() as cache:
        running = programs(model, int(size or 224), batch, options, cache)
        measure(running, options, deadline, keep)
    found = keep()
    print(f"{entry}, batch {batch}, {options.rounds} rounds, {found['device']}", flush=True)
    show(found)


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
        help=f"also convit or plain in other ways, as 'convit: cuDNN + unrolled': {', '.join(WAYS)}",
    )
    parser.add_argument("--other", help="another checkout, compared as the program `other`")
    parser.add_argument("--fresh", action="store_true", help="a new process for each turn")
    parser.add_argument("--minutes", type=float, default=600, help="start nothing after so many")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    options.tasks, options.programs = options.tasks.split(","), options.programs.split(",")
    if unknown := [program for program in options.programs if not known(program)]:
        parser.error(
            f"--programs has {', '.join(unknown)}: there are {', '.join((*OURS, *PEERS))}, and ours in other "
            f"ways, as 'convit: cuDNN + unrolled': {', '.join(WAYS)}."
        )
    if not set(options.programs) - {*PEERS}:
        parser.error("--programs has none of ours to compare with: add convit.")
    if not options.peer:
        options.programs = [program for program in options.programs if program not in PEERS]
    if options.other:
        options.programs.insert(1, "other")
    models, batches = options.models.split(","), [int(number) for number in options.batch.split(",")]
    if len(models) != len(batches):
        parser.error(f"--batch has {len(batches)} numbers for {len(models)} models: give one for each.")
    deadline = time.monotonic() + 60 * options.minutes
    results = {"command": " ".join(sys.argv), "models": {}}
    for entry, batch in zip(models, batches, strict=True):
        compare(entry, batch, options, deadline, results)


if __name__ == "__main__":
    main()
