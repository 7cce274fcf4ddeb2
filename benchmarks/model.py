"""Compares the speed of ConViT with the same network with plain attention and with timm's models.

    python -m benchmarks.model [--models=convit_tiny@224,convit_small@224] [--batch=16,8] [--rounds=5]
        [--seconds=2] [--programs=convit,plain,...] [--settings=JSON] [--peer=PYTHON] [--other=CHECKOUT]
        [--minutes=M] [--json=FILE]

"plain" has the same blocks, tokens, heads and sizes, with plain self-attention instead of GPSA in the first
ten blocks. A form changes how a model computes, not what: "convit+cudnn+unrolled", "timm-convit+compiled".
PYTHON is an interpreter with PyTorch and timm. CHECKOUT is another checkout of this repository; its programs
are other-convit and other-plain, and its own benchmarks/model_jax.py runs them.

In each round every program runs once, in the order of --programs, in its own process. A ratio is the median
over the rounds of the ratios within a round. Each program has its own folder of compiled programs, empty at
the start, so its first step is cold in the first round and warm in the last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TASKS = ("inference", "training")
OURS = ("convit", "plain", "other-convit", "other-plain")
FORMS = {  # settings of our models
    "cudnn": {"attention": "cudnn"},
    "unrolled": {"scan_unroll": 12},
    "remat": {"remat": True},
}
TIMM = {"timm-convit": "convit_{}", "timm-deit": "deit_{}_patch16_224"}  # {}: tiny, small or base
DEFAULT = ("convit", "plain", "timm-convit", "timm-convit+compiled", "timm-deit", "timm-deit+compiled")


def program_names(text):
    """Returns a list of programs, each one of ours in some forms, or one of timm's, perhaps compiled."""
    programs = text.split(",")
    for program in programs:
        base, *forms = program.split("+")
        if not (set(forms) <= set(FORMS) if base in OURS else base in TIMM and forms in ([], ["compiled"])):
            bases = ", ".join((*OURS, *TIMM))
            raise argparse.ArgumentTypeError(f"unknown program {program!r}: give a base of {bases} and its forms")
    return programs


def command(program, model, image_size, batch, options, cache):
    """Returns (command, environment) of a program's process; cache: its folder for compiled programs."""
    base, *forms = program.split("+")
    sizes = [f"--image_size={image_size}", f"--batch={batch}"]
    if base in TIMM:
        name = TIMM[base].format(model.removeprefix("convit_"))
        script = [options.peer, ROOT / "benchmarks/model_timm.py", f"--model={name}", *sizes]
        return [*script, *["--compile"] * len(forms)], {"TORCHINDUCTOR_CACHE_DIR": cache}
    checkout = Path(options.other).resolve() if base.startswith("other-") else ROOT
    settings = json.loads(options.settings)
    for form in forms:
        settings |= FORMS[form]
    script = [sys.executable, "-P", checkout / "benchmarks/model_jax.py", f"--model={model}", *sizes]
    script += [f"--program={base.removeprefix('other-')}", f"--settings={json.dumps(settings)}"]
    return script, {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")])),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def run_once(process, tasks, seconds, timeout):
    """Runs a program and returns {task: answer} of the tasks it finished in time."""
    arguments, environment = process
    try:
        output = subprocess.run(
            arguments,
            input="".join(f"{task} {seconds}\n" for task in tasks),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
        ).stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
    answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return dict(zip(tasks, answers, strict=False))


def measure(processes, options, deadline):
    """Runs all programs, {program: (command, environment)}, for all rounds; a program that fails is not run again.

    Yields {program: [{task: answer} of each round]} after each process. None runs longer than the deadline.
    """
    answers, failed = {program: [] for program in processes}, set()
    reference = next(program for program in processes if program.startswith(OURS))
    for round_number in range(options.rounds):
        for program, process in processes.items():
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"  no time left from {program} in round {round_number + 1} on", flush=True)
                return
            if program in failed:
                continue
            tasks = [*options.tasks, *["peak"] * (program == reference)]
            found = run_once(process, tasks, options.seconds, left)
            answers[program].append(found)
            for task in options.tasks:
                if task in found:
                    result = f"{found[task]['images_per_second']:9.2f} images/s"
                else:
                    failed.add(program)
                    result = " gave no result"
                print(f"  {task:10}{program:36}{result}", flush=True)
            yield answers


def references(program, programs):
    """Returns the programs that a ConViT of ours is compared with."""
    base, *forms = program.split("+")
    if base not in ("convit", "other-convit"):
        return []
    plain = "+".join([base.replace("convit", "plain"), *forms])
    same = [plain, f"other-{program}", *([base] if forms else [])]
    return [other for other in programs if other in same or other.startswith("timm")]


def summary(answers):
    """Returns {"rates": rows of programs, "ratios": rows of pairs} of measure()'s answers."""
    peaks = [turn["peak"]["flops"] for turns in answers.values() for turn in turns if "peak" in turn]
    peak = statistics.median(peaks) if peaks else None
    rates, ratios = [], []
    for task in TASKS:
        rounds = {program: [turn.get(task) for turn in turns] for program, turns in answers.items()}
        for program, found in rounds.items():
            found = [answer for answer in found if answer]
            if not found:
                continue
            rate = statistics.median(answer["images_per_second"] for answer in found)
            row = {"task": task, "program": program, "images_per_second": rate}
            row["first_step"] = [answer["first_step"] for answer in found]
            row["program_mb"] = found[0].get("program_mb")
            if "macs" in found[0] and peak:
                row["mfu"] = rate * found[0]["macs"] * {"inference": 2, "training": 6}[task] / peak
            rates.append(row)
        for ours in answers:
            for other in references(ours, answers):
                each = [
                    a["images_per_second"] / b["images_per_second"]
                    for a, b in zip(rounds[ours], rounds[other], strict=False)
                    if a and b
                ]
                if each:
                    row = {"task": task, "ratio": f"{ours} / {other}", "median": statistics.median(each)}
                    ratios.append({**row, "range": [min(each), max(each)]})
    return {"peak_tflops": peak and peak / 1e12, "rates": rates, "ratios": ratios}


def show(found):
    """Prints the tables of a summary()."""
    if found["peak_tflops"]:
        print(f"  MFU against a large matrix product at {found['peak_tflops']:.3g} TFLOP/s")
    print(f"  {'':46} images/s     MFU   first step, cold and warm   memory MB")
    for row in found["rates"]:
        mfu = f"{row['mfu']:7.1%}" if "mfu" in row else f"{'-':>7}"
        first, *later = row["first_step"]
        first = f"{first:15.1f} s" + (f"{later[-1]:7.1f} s" if later else f"{'-':>9}")
        memory = f"{row['program_mb']:12.0f}" if row["program_mb"] else f"{'-':>12}"
        print(f"  {row['task']:10}{row['program']:36}{row['images_per_second']:9.2f} {mfu}{first}{memory}")
    for row in found["ratios"]:
        low, high = row["range"]
        print(f"  {row['task']:10}{row['ratio']:46}{row['median']:6.2f} ({low:.2f} to {high:.2f})")


def parse_options():
    """Returns the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="convit_tiny@224,convit_small@224", help="MODEL@PIXELS,...")
    parser.add_argument("--batch", default="16,8", help="images a step, one number for each model")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of one task in one round")
    parser.add_argument("--settings", default="{}", help="""of our models, as '{"dtype": "bfloat16"}'""")
    programs = f"default: {','.join(DEFAULT)}; forms of ours: {', '.join(FORMS)}"
    parser.add_argument("--programs", type=program_names, help=programs)
    parser.add_argument("--peer", help="a Python with PyTorch and timm; without it timm is left out")
    parser.add_argument("--other", help="another checkout of this repository")
    parser.add_argument("--minutes", type=float, default=600, help="limit for all models together")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    given = options.programs or [*DEFAULT]
    if options.other and not options.programs:
        given[2:2] = ["other-convit", "other-plain"]
    if any(program.startswith("other-") for program in given) and not options.other:
        parser.error("other-convit and other-plain need --other=CHECKOUT")
    options.programs = [program for program in dict.fromkeys(given) if options.peer or "timm" not in program]
    if not any(program.startswith(OURS) for program in options.programs):
        parser.error("--programs has none of ours: add convit")
    options.tasks = options.tasks.split(",")
    models, batches = options.models.split(","), options.batch.split(",")
    if len(models) != len(batches):
        parser.error(f"--batch has {len(batches)} numbers for {len(models)} models: give one for each")
    options.models = dict(zip(models, map(int, batches), strict=True))
    return options


def main():
    options = parse_options()
    deadline = time.monotonic() + 60 * options.minutes
    results = {"command": sys.argv, "models": {}}
    for entry, batch in options.models.items():
        model, _, size = entry.partition("@")

        print(f"{entry}, batch {batch}", flush=True)
        with tempfile.TemporaryDirectory() as cache:
            processes = {
                program: command(program, model, int(size or 224), batch, options, f"{cache}/{program}")
                for program in options.programs
            }
            for answers in measure(processes, options, deadline):
                devices = [a["device"] for turns in answers.values() for turn in turns for a in turn.values()]
                found = {"batch": batch, "device": devices[0] if devices else "no device", **summary(answers)}
                results["models"][entry] = {**found, "answers": answers}
                if options.json:
                    Path(options.json).write_text(json.dumps(results, indent=1))
        if found := results["models"].get(entry):
            print(f"{entry}, batch {batch}, {options.rounds} rounds, {found['device']}")
            show(found)


if __name__ == "__main__":
    main()
