"""The paper's experiments on CIFAR-10 as an image folder, in the paper's proportions at 32 px.

python -m convit_jax.study studies/cifar10.py:sample_efficiency --config.data.dir=CIFAR10
# or :models, :ablations, :locality; :distillation, whose teacher is the largest ConViT of :models;
# without a GPU :sample_efficiency_cpu and :ablations_cpu, a narrower model, fewer images, no mixing
"""

from studies import ablations, chosen, sample_efficiency, small_plans, small_rows

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
TEACHER = "runs/cifar10_models/runs/convit-b+-seed0"
SEEDS = (0, 1, 2)
FRACTIONS = (0.02, 0.05, 0.1, 0.3, 1)


def get_plan(name=""):
    sizes = {"width_divisor": 4, "layers": (3, 6, 9)}
    rows, letters = small_rows(CONFIG)
    return chosen(
        name,
        {
            **small_plans("CIFAR-10", CONFIG, GPU, SEEDS, FRACTIONS, **sizes, teacher=TEACHER),
            "sample_efficiency_cpu": sample_efficiency("CIFAR-10", rows, FRACTIONS[:3], SEEDS, LONG),
            "ablations_cpu": ablations("CIFAR-10", letters, {"10%": 0.1}, SEEDS, CPU),
        },
    )
