"""The paper's experiments on ImageNet, with the paper's recipe; its numbers are printed next to ours.

python -m convit_jax.study studies/imagenet.py:models --config.data.dir=IMAGENET              # Table 1
python -m convit_jax.study studies/imagenet.py:sample_efficiency --config.data.dir=IMAGENET   # Table 2
python -m convit_jax.study studies/imagenet.py:ablations --config.data.dir=IMAGENET           # Table 3
python -m convit_jax.study studies/imagenet.py:locality --config.data.dir=IMAGENET            # Fig. 8
python -m convit_jax.study studies/imagenet.py:locality_early --config.data.dir=IMAGENET      # its start
python -m convit_jax.study studies/imagenet.py:distillation --config.data.dir=IMAGENET        # Table 4
"""

from studies import ABLATIONS, ablations, chosen, locality, sample_efficiency

SEEDS = (0,)
TABLE_1 = {
    "DeiT-Ti": {"top1": 72.2},
    "ConViT-Ti": {"top1": 73.1, "top5": 91.7},
    "DeiT-Ti+": {"top1": 75.9, "top5": 93.2},
    "ConViT-Ti+": {"top1": 76.7, "top5": 93.6},
    "DeiT-S": {"top1": 79.8},
    "ConViT-S": {"top1": 81.3, "top5": 95.7},
    "DeiT-S+": {"top1": 79.0, "top5": 94.4},
    "ConViT-S+": {"top1": 82.2, "top5": 95.9},
    "DeiT-B": {"top1": 81.8},
    "ConViT-B": {"top1": 82.4, "top5": 95.9},
    "DeiT-B+": {"top1": 77.5, "top5": 93.5},
    "ConViT-B+": {"top1": 82.5, "top5": 95.9},
}
FRACTIONS = (0.05, 0.1, 0.3, 0.5, 1)
TABLE_2 = {
    "top1": {"DeiT-S": (34.8, 48.0, 66.1, 74.6, 79.9), "ConViT-S": (47.8, 59.6, 73.7, 78.2, 81.4)},
    "top5": {"DeiT-S": (57.8, 71.5, 86.0, 91.8, 95.0), "ConViT-S": (70.7, 80.3, 90.7, 93.8, 95.8)},
}
TABLE_3 = {  # all images, a tenth of each class
    "a": (82.2, 59.7),
    "b": (82.0, 57.4),
    "c": (81.4, 56.9),
    "d": (81.6, 54.6),
    "e": (79.1, 47.8),
    "f": (78.6, 54.3),
    "g": (73.7, 44.8),
}
TABLE_4 = {"DeiT-S": {"top1": 80.9}, "DeiT-B": {"top1": 83.0}, "ConViT-S+": {"top1": 82.9}}
HARD = {"distill.teacher": "convit_base", "distill.kind": "hard"}  # a RegNetY-16GF has no loader here
FIRST_100 = {"data.num_classes": 100}
EARLY = {"steps": 20 * 100 * 1300 // 1024}  # 20 epochs in batches of 1,024; a class has at most 1,300 images


def config_of(row):
    """ConViT-S+ -> configs/convit_s_plus.py."""
    return f"configs/{row.lower().replace('-', '_').replace('+', '_plus')}.py"


def table(rows, title, question, paper, overrides, **keys):
    """A study of one run per row of the paper's table."""
    runs = [
        dict(row=row, config=config_of(row), overrides=overrides, seeds=SEEDS, paper=numbers)
        for row, numbers in paper.items()
    ]
    return dict(title=f"{title} on ImageNet", question=question, rows=rows, runs=runs, **keys)


def get_plan(name=""):
    rows = {row: (config_of(row), {}) for row in ("DeiT-S", "ConViT-S")}
    letters = {letter: (f"configs/ablations.py:{letter}", {}) for letter in ABLATIONS}
    sizes = "ConViT against DeiT at six sizes (the paper's Table 1)."
    taught = "What a student learns from a teacher too (the paper's Table 4, with a RegNetY-16GF)."
    fig_8 = ("configs/convit_s.py", (3, 6, 9), SEEDS)  # the size is our choice
    plans = {
        "models": table("model", "The twelve models", sizes, TABLE_1, {}, metrics=["top1", "top5"]),
        "sample_efficiency": sample_efficiency("ImageNet", rows, FRACTIONS, SEEDS, {}, TABLE_2),
        "ablations": ablations("ImageNet", letters, {"all": 1.0, "10%": 0.1}, SEEDS, {}, {"top1": TABLE_3}),
        "locality": locality("100 classes of ImageNet", *fig_8, FIRST_100),
        "locality_early": locality("100 classes of ImageNet, 20 of 300 epochs", *fig_8, FIRST_100 | EARLY),
        # the first column of Table 4, learning from labels only, is Table 1's
        "distillation": table("student", "Distillation", taught, TABLE_4, HARD),
    }
    return chosen(name, plans)
