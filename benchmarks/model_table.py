"""The tables of benchmarks.model: rates, first steps, memory, and ratios against what is asked for."""

import statistics
import sys

TASKS = ("inference", "training")
# What is asked for: task, to what, least ratio of ConViT's images/s to it on (CPU, GPU).
RATIOS = [
    ("inference", "plain", (0.95, 0.95)),
    ("training", "plain", (0.95, 0.95)),
    ("inference", "timm convit", (2, 3)),
    ("inference", "timm convit compiled", (2, 2)),
    ("training", "timm convit", (1.5, 3)),
    ("training", "timm convit compiled", (1.5, 2)),
    ("inference", "timm deit", None),
    ("training", "timm deit", None),
    ("inference", "other", None),
    ("training", "other", None),
]
MEMORY, MFU, FIRST_STEP = 1.10, "40% (GPU, ConViT-S, batch 512)", "20 s, 5 s (CPU), 40 s, 8 s (GPU)"
BESIDE_TIMM = """\
  timm computes all tokens of the last block, ours those that have a head; on a GPU, under autocast, its
  tokens between blocks are float32, ours bfloat16."""


def of_same_ways(base, ours):
    """The plain network that does things as ours does (it has no position); any other program is itself."""
    ways = [way for way in ours.partition(": ")[2].split(" + ") if way and not way.startswith("position")]
    return ": ".join(filter(None, ["plain", " + ".join(ways)])) if base == "plain" else base


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
            row["peak_mb"] = max(values(name, task, "peak_mb")[-options.rounds :], default=None)
            row["program_mb"] = next(iter(values(name, task, "program_mb")), None)
            macs = values(name, task, "macs")
            if macs and peak:
                flops = {"inference": 2, "training": 6}[task] * macs[0]
                row["gmacs"] = macs[0] / 1e9
                row["mfu"] = row["images_per_second"] * flops / statistics.median(peak)
            rows.append(row)
    pairs = [
        (task, ours, of_same_ways(theirs, ours), least)
        for ours in by_name
        if ours.partition(": ")[0] == "convit"
        for task, theirs, least in RATIOS
    ]
    ways = [(task, name, name.partition(": ")[0], None) for name in by_name if ": " in name for task in TASKS]
    for task, ours, theirs, least in [*pairs, *ways]:
        row = {"task": task, "ratio": f"{ours} / {theirs}", "least": least}
        for field in ("images_per_second", "images_per_processor_second"):
            turns = list(zip(values(ours, task, field), values(theirs, task, field), strict=False))
            if task in options.tasks and turns:
                each = sorted(a / b for a, b in turns)
                row[field] = statistics.median(each)
                row[f"{field}_range"] = [each[0], each[-1]]
        if "images_per_second" in row:
            ratios.append(row)
    for task, ours, theirs, _ in pairs:
        if task == "training" and theirs.startswith("plain") and task in options.tasks:
            memory = [values(name, task, "program_mb") for name in (ours, theirs)]
            if all(memory):
                value = memory[0][0] / memory[1][0]
                ratios.append({"task": task, "ratio": f"memory {ours} / {theirs}", "value": value})
    return {"peak_tflops": statistics.median(peak) / 1e12 if peak else None, "rates": rows, "ratios": ratios}


def show(found):
    """Print one model's tables."""
    if found["peak_tflops"]:
        print(f"  large matrix product: {found['peak_tflops']:.3g} TFLOP/s")
    gmacs = next(
        (f", {row['gmacs']:.4g} GMAC an image forward" for row in found["rates"] if "gmacs" in row), ""
    )
    print(f"  asked for: MFU {MFU}; first step of training, cold and warm, {FIRST_STEP}{gmacs}")
    print(f"  {'':60}images/s   MFU   first step cold, warm   peak MB   program MB")
    for row in found["rates"]:
        mfu = f"{row['mfu']:6.1%}" if "mfu" in row else "     -"
        warm = f"{row['first_step_warm']:6.1f} s" if row["first_step_warm"] is not None else "       -"
        held = f"{row['peak_mb']:11.0f}" if row["peak_mb"] else "          -"
        needed = f"{row['program_mb']:10.0f}" if row["program_mb"] else "         -"
        print(
            f"  {row['task']:10}{row['program']:50}{row['images_per_second']:9.2f} {mfu}"
            f"{row['first_step_cold']:13.1f} s {warm}{held} {needed}"
        )
    for row in found["ratios"]:
        if "value" in row:
            print(f"  {row['task']:10}{row['ratio']:60}{row['value']:6.2f}; asked for: at most {MEMORY}")
            continue
        low, high = row["images_per_second_range"]
        least = (
            "" if row["least"] is None else f"; asked for: {row['least'][0]} (CPU), {row['least'][1]} (GPU)"
        )
        print(
            f"  {row['task']:10}{row['ratio']:60}{row['images_per_second']:6.2f} ({low:.2f} to {high:.2f}), "
            f"per processor time {row['images_per_processor_second']:.2f}{least}"
        )
    if any("timm" in row["ratio"] for row in found["ratios"]):
        print(BESIDE_TIMM)
    sys.stdout.flush()
