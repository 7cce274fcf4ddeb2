"""The paper's experiments on ImageNet, with the paper's recipe; its numbers are printed next to ours.

python -m convit_jax.study studies/imagenet.py:models --config.data.dir=IMAGENET              # Table 1
python -m convit_jax.study studies/imagenet.py:sample_efficiency --config.data.dir=IMAGENET   # Table 2
python -m convit_jax.study studies/imagenet.py:ablations --config.data.dir=IMAGENET           # Table 3
python -m convit_jax.study studies/imagenet.py:locality --config.data.dir=IMAGENET            # Fig. 8
python -m convit_jax.study studies/imagenet.py:locality_early --config.data.dir=IMAGENET      # its start
python -m convit_jax.study studies/imagenet.py:distillation --config.data.dir=IMAGENET        # Table 4
"""

from studies import ABLATIONS, ablations, chosen, locality, run, sample_efficiency

SEEDS = (0,)
TOP1 = {
    "DeiT": {"Ti": 72.2, "Ti+": 75.9, "S": 79.8, "S+": 79.0, "B": 81.8, "B+": 77.5},
    "ConViT": {"Ti": 73.1, "Ti+": 76.7, "S": 81.3, "S+": 82.2, "B": 82.4, "B+": 82.5},
}
TOP5 = {
    "DeiT": {"Ti+": 93.2, "S+": 94.4, "B+": 93.5},
    "ConViT": {"Ti": 91.7, "Ti+": 93.6, "S": 95.7, "S+": 95.9, "B": 95.9, "B+": 95.9},
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
TABLE_4 = {"DeiT-S": 80.9, "DeiT-B": 83.0, "ConViT-S+": 82.9}  # with a RegNetY-16GF, which has no loader here
TEACHER = "convit_base"
FIRST_100 = {"data.num_classes": 100}
EARLY = {"steps": 20 * 100 * 1300 // 1024}  # 20 epochs in batches of 1,024; a class has at most 1,300 images


def config_of(row):
    """ConViT-S+ -> configs/convit_s_plus.py."""
    return f"configs/{row.lower().replace('-', '_').replace('+', '_plus')}.py"


def models():
    """Table 1."""
    runs = []
    for size in TOP1["DeiT"]:
        for kind in TOP1:
            row = f"{kind}-{size}"
            top5 = {"top5": TOP5[kind][size]} if size in TOP5[kind] else {}
            runs.append(run(row, None, config_of(row), SEEDS, paper={"top1": TOP1[kind][size], **top5}))
    return {
        "title": "The twelve models on ImageNet",
        "question": "ConViT against DeiT at six sizes (the paper's Table 1).",
        "rows": "model",
        "metrics": ["top1", "top5"],
        "runs": runs,
    }


def distillation():
    """Table 4; its first column, learning from labels only, is Table 1's."""
    taught = {"distill.teacher": TEACHER, "distill.kind": "hard"}
    return {
        "title": "Distillation on ImageNet",
        "question": "What a student learns from a teacher too (the paper's Table 4, with a RegNetY-16GF).",
        "rows": "student",
        "runs": [run(row, None, config_of(row), SEEDS, taught, paper={"top1": top1}) for row, top1 in TABLE_4.items()],
    }


def fig_8(data, overrides):
    """Fig. 8, of ConViT-S: the size is our choice."""
    return locality(data, "configs/convit_s.py", (3, 6, 9), SEEDS, overrides)


def get_plan(name=""):
    rows = {row: (config_of(row), {}) for row in ("DeiT-S", "ConViT-S")}
    letters = {letter: (f"configs/ablations.py:{letter}", {}) for letter in ABLATIONS}
    plans = {
        "models": models(),
        "sample_efficiency": sample_efficiency("ImageNet", rows, FRACTIONS, SEEDS, {}, paper=TABLE_2),
        "ablations": ablations("ImageNet", letters, {"all": 1.0, "10%": 0.1}, SEEDS, {}, paper={"top1": TABLE_3}),
        "locality": fig_8("100 classes of ImageNet", FIRST_100),
        "locality_early": fig_8("100 classes of ImageNet, 20 of 300 epochs", FIRST_100 | EARLY),
        "distillation": distillation(),
    }
    return chosen(name, plans)
