"""The paper's experiments on CIFAR-10 as an image folder, in the paper's proportions at 32 px.

python -m convit_jax.study studies/cifar10.py:sample_efficiency --config.data.dir=CIFAR10
# or :models, :ablations, :locality; :distillation, whose teacher is runs/cifar10;
# without a GPU :sample_efficiency_cpu, a smaller model on 2, 5 and 10 %
"""

from studies import (
    TENTH,
    ablations,
    chosen,
    distillation,
    locality,
    models,
    sample_efficiency,
    small_ablations,
    small_models,
)

CONFIG = "configs/cifar10.py"  # patches of 4: a grid of 8 x 8
RANDOM = {"data.subset_rule": "random"}  # so that seeds differ in their images too
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
CPU = RANDOM | {"epochs": 20, "optim.warmup_epochs": 2}  # with the config's 6 blocks, 5 of them GPSA, 96 wide
SEEDS = (0, 1, 2)
FRACTIONS = (0.02, 0.05, 0.1, 0.3, 1)


def get_plan(name=""):
    return chosen(
        name,
        {
            "models": models("CIFAR-10", CONFIG, 4, SEEDS, overrides=GPU),
            "sample_efficiency": sample_efficiency(
                "CIFAR-10", small_models(CONFIG), FRACTIONS, SEEDS, baseline="DeiT", overrides=GPU
            ),
            "sample_efficiency_cpu": sample_efficiency(
                "CIFAR-10", small_models(CONFIG), FRACTIONS[:3], SEEDS, baseline="DeiT", overrides=CPU
            ),
            "ablations": ablations("CIFAR-10", small_ablations(CONFIG), SEEDS, overrides=GPU),
            "locality": locality(
                "a tenth of CIFAR-10", CONFIG, (0.01, 0.1, 1.0), (3, 6, 9), SEEDS, overrides=GPU | TENTH
            ),
            "distillation": distillation("CIFAR-10", CONFIG, "runs/cifar10", SEEDS, overrides=GPU),
        },
    )
