"""The paper's experiments on CIFAR-10 as an image folder, in the paper's proportions at 32 px.

python -m convit_jax.study studies/cifar10.py:sample_efficiency --config.data.dir=CIFAR10
# or :models, :ablations, :locality; :distillation, whose teacher is the largest ConViT of :models;
# without a GPU :sample_efficiency_cpu and :ablations_cpu, a narrower model, fewer images, no mixing
# :fine_tuning_cpu, on five classes, from a network trained on the other five (docs/experiments.md)
"""

from studies import ablations, chosen, over_fractions, sample_efficiency, small_plans, small_rows

CONFIG = "configs/cifar10.py"  # patches of 4: a grid of 8 x 8
RANDOM = {"data.subset_rule": "random"}  # seeds then differ in their images too
GPU = RANDOM | {
    "epochs": 100,
    "optim.warmup_epochs": 5,
    "model.depth": 12,
    "model.local_up_to_layer": 10,
    "model.embed_dim": 192,
    "model.num_heads": 4,
    "model.dtype": "bfloat16",
    "data.workers": 8,
}
CPU = RANDOM | {  # 100,000 images, ten minutes on a core
    "epochs": 2,
    "optim.warmup_epochs": 0.2,
    "optim.lr": 12e-3,
    "batch_size": 64,
    "eval_every": 0.5,
    "eval_batch_size": 500,
    "model.depth": 12,
    "model.local_up_to_layer": 10,
    "model.embed_dim": 64,
    "model.num_heads": 4,
    "augment.policy": "none",
    "augment.erase_prob": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
}
LONG = CPU | {"epochs": 6, "eval_every": 1.0}  # with fewer, DeiT does not overfit larger parts
SHORT = CPU | {"epochs": 1, "eval_every": 1.0}  # 25,000 images of five classes
TEACHER = "runs/cifar10_models/runs/convit-b+-seed0"
PRETRAINED = "runs/cifar10_five"  # a run of configs/cifar10.py on the other five classes
SEEDS = (0, 1, 2)
FRACTIONS = (0.02, 0.05, 0.1, 0.3, 1)


def fine_tuning():
    """Fine-tuning and a linear probe with configs/finetune.py against training from scratch on twice as many images."""
    tuned = {"init_from": PRETRAINED, "optim.lr": 4e-3, "augment.crop": "pad", "data.workers": 0}
    alike = tuned | {"optim.layer_decay": 1.0, "optim.lr": CPU["optim.lr"]}
    probe = tuned | {"optim.freeze": "backbone", "optim.lr": 4e-2}
    rows = {
        "from scratch": (CONFIG, {"epochs": 2}),
        "fine-tuned": ("configs/finetune.py", tuned),
        "fine-tuned at one rate": ("configs/finetune.py", alike),
        "linear probe": ("configs/finetune.py", probe),
    }
    return dict(
        title="Fine-tuning on five classes of CIFAR-10",
        question="A network trained on the other five classes against training from scratch on twice as many images.",
        rows="training",
        columns="fraction of each class",
        scale="fraction",
        baseline="from scratch",
        runs=over_fractions(rows, {0.01: 0.01, 0.1: 0.1}, SEEDS, SHORT, {}),
    )


def get_plan(name=""):
    sizes = {"width_divisor": 4, "layers": (3, 6, 9)}
    rows, letters = small_rows(CONFIG)
    return chosen(
        name,
        {
            **small_plans("CIFAR-10", CONFIG, GPU, SEEDS, FRACTIONS, **sizes, teacher=TEACHER),
            "sample_efficiency_cpu": sample_efficiency("CIFAR-10", rows, FRACTIONS[:3], SEEDS, LONG),
            "fine_tuning_cpu": fine_tuning(),
            "ablations_cpu": ablations("CIFAR-10", letters, {"10%": 0.1}, SEEDS, CPU),
        },
    )
