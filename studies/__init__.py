"""The paper's experiments as studies of any data; the other files of this folder say of which.

convit_jax/study/plan.py describes the dicts. `overrides` change the config for all runs of a study.
"""

from configs.ablations import CHANGES
from convit_jax.errors import UserError
from convit_jax.models.variants import SIZES

GPSA = "model.local_up_to_layer"
DEIT = {"model.name": "deit_tiny", GPSA: 0}  # makes a ConViT of any size the DeiT of the same depth, width, heads
PAPER_SIZES = {"tiny": "Ti", "small": "S", "base": "B"}
ABLATIONS = {
    "a": "a: ConViT",
    "b": "b: gates fixed",
    "c": "c: no convolutional init",
    "d": "d: gates fixed, no convolutional init",
    "e": "e: DeiT",
    "f": "f: as b, GPSA frozen",
    "g": "g: as d, GPSA frozen",
}


def chosen(name, plans):
    """Returns the study of this name."""
    if name not in plans:
        raise UserError(f"say which study of the file, as FILE.py:NAME; it has {', '.join(plans)}.")
    return plans[name]


def part_of_each_class(fraction, overrides):
    """Returns overrides that train, and warm up, on a part of each class for as many images as on all."""
    part = {"data.sampling_ratio": fraction, "data.keep_total_images": True}
    if "optim.warmup_epochs" in overrides:
        part["optim.warmup_epochs"] = overrides["optim.warmup_epochs"] / fraction
    return overrides | part


def over_fractions(rows, fractions, seeds, overrides, paper):
    """Returns the runs of {row: (config, overrides)} on each of {column: fraction}."""
    return [
        dict(
            row=row,
            column=column,
            config=config,
            overrides=part_of_each_class(fraction, overrides) | own,
            seeds=seeds,
            paper={metric: numbers[row][n] for metric, numbers in paper.items()},
        )
        for row, (config, own) in rows.items()
        for n, (column, fraction) in enumerate(fractions.items())
    ]


def models(data, config, width_divisor, seeds, overrides):
    """Table 1: ConViT and DeiT in the paper's six sizes, with its heads and a part of its width."""
    runs = []
    for name, (width, heads) in SIZES.items():
        kind, size, *plus = name.split("_")
        row = f"{'ConViT' if kind == 'convit' else 'DeiT'}-{PAPER_SIZES.get(size, size)}{'+' if plus else ''}"
        own = {"model.embed_dim": width // width_divisor, "model.num_heads": heads}
        own |= DEIT if kind == "deit" else {}
        runs.append(dict(row=row, config=config, overrides=overrides | own, seeds=seeds))
    return dict(
        title=f"The twelve models on {data}",
        question=f"ConViT against DeiT, the paper's heads, 1/{width_divisor} of its widths (Table 1).",
        rows="model",
        runs=runs,
    )


def sample_efficiency(data, rows, fractions, seeds, overrides, paper=None):
    """Table 2: a DeiT and a ConViT, {row: (config, overrides)}, on parts of each class.

    paper: {"top1": {row: [a number per fraction]}}.
    """
    baseline, model = rows
    return dict(
        title=f"Sample efficiency on {data}",
        question=f"{model} against {baseline} on a part of each class, as many images shown (Table 2).",
        rows="model",
        columns="fraction of each class",
        scale="fraction",
        baseline=baseline,
        metrics=list(paper or ["top1"]),
        runs=over_fractions(rows, {float(f): f for f in fractions}, seeds, overrides, paper or {}),
    )


def ablations(data, rows, fractions, seeds, overrides, paper=None):
    """Table 3: {letter: (config, overrides)} on {column: fraction} of each class."""
    return dict(
        title=f"Ablations on {data}",
        question="What each part of ConViT contributes (Table 3).",
        rows="ablation",
        columns="images of each class",
        labels=ABLATIONS,
        runs=over_fractions(rows, fractions, seeds, overrides, paper or {}),
    )


def distillation(data, config, teacher, seeds, overrides):
    """Table 4: what a student learns from a teacher in addition to the labels."""
    overrides = overrides | {"distill.teacher": teacher}
    token = DEIT | {"model.distilled": True}
    students = {"DeiT": DEIT, "DeiT with distillation token": token, "ConViT": {}}
    ways = {
        "labels only": {"distill.alpha": 0.0},  # has a teacher too: --config.distill.teacher is for all runs
        "hard": {"distill.kind": "hard"},
        "soft": {"distill.kind": "soft", "distill.temperature": 3.0},
    }
    return dict(
        title=f"Distillation on {data}",
        question="What a student learns from a teacher in addition to the labels (Table 4).",
        rows="student",
        columns="learns from",
        runs=[
            dict(row=row, column=column, config=config, overrides=overrides | student | way, seeds=seeds)
            for row, student in students.items()
            for column, way in ways.items()
            if (student, column) != (token, "labels only")  # its second head would learn nothing
        ],
    )


def locality(data, config, layers, seeds, overrides):
    """Fig. 8: each locality strength with each number of GPSA layers, and the model without GPSA."""
    cells = [("no GPSA", 0, {})]
    cells += [(alpha, count, {"model.locality_strength": alpha}) for alpha in (0.01, 0.1, 1.0) for count in layers]
    return dict(
        title=f"Locality on {data}",
        question="Locality strength of the convolutional init, and number of GPSA layers (Fig. 8).",
        rows="locality strength",
        columns="number of GPSA layers",
        runs=[
            dict(row=row, column=count, config=config, overrides=overrides | own | {GPSA: count}, seeds=seeds)
            for row, count, own in cells
        ],
    )


def small_rows(config):
    """Returns the rows of `sample_efficiency` and of `ablations` for the config of a small ConViT."""
    letters = {letter: (config, CHANGES.get(letter, DEIT)) for letter in ABLATIONS}
    return {"DeiT": (config, DEIT), "ConViT": (config, {})}, letters


def small_plans(data, config, overrides, seeds, fractions, *, width_divisor, layers, teacher):
    """Returns all studies of a small ConViT; `locality` trains on a tenth of each class."""
    rows, letters = small_rows(config)
    tenth = part_of_each_class(0.1, overrides)
    return {
        "models": models(data, config, width_divisor, seeds, overrides),
        "sample_efficiency": sample_efficiency(data, rows, fractions, seeds, overrides),
        "ablations": ablations(data, letters, {"all": 1.0, "10%": 0.1}, seeds, overrides),
        "locality": locality(f"a tenth of {data}", config, layers, seeds, tenth),
        "distillation": distillation(data, config, teacher, seeds, overrides),
    }
