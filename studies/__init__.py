"""The paper's experiments as plans for any images and models; the files in this folder say for which.

convit_jax/study/plan.py says what a plan is.
"""

from configs.ablations import CHANGES
from convit_jax.errors import UserError
from convit_jax.models.variants import SIZES

# A ConViT of any size becomes the DeiT of the same depth, width and heads: no GPSA, class token from the
# start, a position embedding for it too, biases of query, key, value (convit_jax/models/variants.py).
DEIT = {"model.name": "deit_tiny", "model.local_up_to_layer": 0}
KINDS = {"convit": ("ConViT", {}), "deit": ("DeiT", DEIT)}  # in the names of models: (in tables, changes)
PAPER_SIZES = {"tiny": "Ti", "small": "S", "base": "B"}
ALL_AND_A_TENTH = {"all": 1.0, "10%": 0.1}  # the columns of Table 3
# A tenth of each class in a small plan, whose warm-up of 5 epochs is of as many images there.
TENTH = {"data.sampling_ratio": 0.1, "data.keep_total_images": True, "optim.warmup_epochs": 50}


def chosen(name, plans):
    """The plan of this name."""
    if name not in plans:
        raise UserError(f"say which plan of the file, as PLAN.py:NAME; it has {', '.join(plans)}.")
    return plans[name]


def sizes(images, config, share, seeds, *, overrides):
    """Table 1: ConViT and DeiT at the paper's six sizes, with its heads and 1 / share of its width."""
    runs = []
    for name, (width, heads) in SIZES.items():
        kind, letter, *plus = name.split("_")
        row = f"{KINDS[kind][0]}-{PAPER_SIZES[letter]}{'+' if plus else ''}"
        size = {"model.embed_dim": width // share, "model.num_heads": heads}
        runs.append(_run(row, None, config, seeds, overrides, KINDS[kind][1], size))
    return {
        "title": f"The twelve models on {images}",
        "question": f"ConViT against DeiT, the paper's heads, 1/{share} of its widths (Table 1).",
        "rows": "model",
        "runs": runs,
    }


def distillation(images, config, teacher, seeds, *, overrides):
    """Table 4: what a student learns from a teacher beside the labels.

    teacher: its path, unless the command has --config.distill.teacher=PATH.
    """
    token = {**DEIT, "model.distilled": True}
    students = {"DeiT": DEIT, "DeiT with distillation token": token, "ConViT": {}}
    ways = {
        "labels only": {"distill.alpha": 0.0},  # the teacher idles: the command's may be given for all runs
        "hard": {"distill.kind": "hard"},
        "soft": {"distill.kind": "soft", "distill.temperature": 3.0},
    }
    idle = ("DeiT with distillation token", "labels only")  # its second head would learn nothing
    overrides = {**overrides, "distill.teacher": teacher}

    return {
        "title": f"Distillation on {images}",
        "question": "What a student learns from a teacher beside the labels (Table 4).",
        "rows": "student",
        "columns": "learns from",
        "runs": [
            _run(row, column, config, seeds, overrides, student, way)
            for row, student in students.items()
            for column, way in ways.items()
            if (row, column) != idle
        ],
    }


def sample_efficiency(images, models, fractions, seeds, *, baseline, overrides=None, paper=None):
    """Table 2: models on a part of each class, as many images shown on every part.

    Args:
      images: what they are, as "digits". models: {row: (config, overrides)}. fractions: of each class.
      overrides: of all runs. paper: {"top1": {row: [a number for each fraction]}}.
    """
    against = " against ".join(reversed(models))
    return {
        "title": f"Sample efficiency on {images}",
        "question": f"{against} on a part of each class, as many images shown on every part (Table 2).",
        "rows": "model",
        "columns": "fraction of each class",
        "scale": "fraction",
        "baseline": baseline,
        "metrics": list(paper) if paper else ["top1"],
        "runs": _over_fractions(models, {float(f): f for f in fractions}, seeds, overrides, paper),
    }


def ablations(images, rows, seeds, *, fractions=ALL_AND_A_TENTH, overrides=None, paper=None):
    """Table 3: its rows on all images and on a tenth of each class. rows: {letter: (config, overrides)}."""
    return {
        "title": f"Ablations on {images}",
        "question": "The worth of each part of ConViT (Table 3).",
        "rows": "ablation",
        "columns": "images of each class",
        "labels": {
            "a": "a: ConViT",
            "b": "b: gates fixed",
            "c": "c: no convolutional init",
            "d": "d: gates fixed, no convolutional init",
            "e": "e: DeiT",
            "f": "f: as b, GPSA frozen",
            "g": "g: as d, GPSA frozen",
        },
        "runs": _over_fractions(rows, fractions, seeds, overrides, paper),
    }


def small_models(config):
    """The models of `sample_efficiency` for the config of a small ConViT."""
    return {"DeiT": (config, DEIT), "ConViT": (config, {})}


def small_ablations(config):
    """The rows of `ablations` for the config of a small ConViT."""
    return {row: (config, CHANGES.get(row, DEIT)) for row in "abcdefg"}


def locality(images, config, strengths, layers, seeds, *, overrides=None):
    """Fig. 8: each locality strength with each number of GPSA layers, and the model without any."""

    def entry(row, count, own):
        return _run(row, count, config, seeds, overrides or {}, {"model.local_up_to_layer": count}, own)

    return {
        "title": f"Locality on {images}",
        "question": "Locality strength of the convolutional init, and number of GPSA layers (Fig. 8).",
        "rows": "locality strength",
        "columns": "number of GPSA layers",
        "runs": [
            entry("no GPSA", 0, {}),
            *(entry(a, count, {"model.locality_strength": a}) for a in strengths for count in layers),
        ],
    }


def small_plans(images, config, *, settings, seeds, fractions, share, layers, teacher):
    """All plans of a small ConViT, {name: plan}.

    Args:
      settings: overrides of all runs. share: see `sizes`. layers: see `locality`, on a tenth of each class.
      teacher: see `distillation`.
    """
    rows = small_models(config)
    return {
        "models": sizes(images, config, share, seeds, overrides=settings),
        "sample_efficiency": sample_efficiency(
            images, rows, fractions, seeds, baseline="DeiT", overrides=settings
        ),
        "ablations": ablations(images, small_ablations(config), seeds, overrides=settings),
        "locality": locality(
            f"a tenth of {images}", config, (0.01, 0.1, 1.0), layers, seeds, overrides=settings | TENTH
        ),
        "distillation": distillation(images, config, teacher, seeds, overrides=settings),
    }


def _run(row, column, config, seeds, *overrides, paper=None):
    """A run of a plan; of several overrides the later ones win."""
    merged = {name: value for changes in overrides for name, value in changes.items()}
    run = {"row": row, "column": column, "config": config, "overrides": merged, "seeds": seeds}
    return run | {"paper": paper or {}}


def _over_fractions(rows, fractions, seeds, overrides, paper):
    """Runs of each row on each fraction. fractions: {column: fraction}.

    Where the overrides set a warm-up it is in epochs of all images: about as many images on each part.
    """
    overrides = dict(overrides or {})
    warmup = overrides.pop("optim.warmup_epochs", None)

    def of(fraction):
        part = {"data.sampling_ratio": fraction, "data.keep_total_images": True}
        return part if warmup is None else {**part, "optim.warmup_epochs": warmup / fraction}

    return [
        _run(
            row,
            column,
            config,
            seeds,
            overrides,
            own,
            of(fraction),
            paper={metric: numbers[row][n] for metric, numbers in (paper or {}).items()},
        )
        for row, (config, own) in rows.items()
        for n, (column, fraction) in enumerate(fractions.items())
    ]
