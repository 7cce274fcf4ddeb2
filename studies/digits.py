"""The paper's experiments on scikit-learn's digits: minutes per run on a CPU, no download.

python -m convit_jax.study studies/digits.py:sample_efficiency
# or :models, :ablations, :locality; after python train.py, which trains the teacher, :distillation
"""

from studies import chosen, small_plans

CONFIG = "configs/digits.py"  # 6 blocks, of ConViT 5 GPSA, 72 wide, 9 heads
OVERRIDES = {
    "epochs": 50,
    "optim.warmup_epochs": 5,
    "data.subset_rule": "random",  # seeds then differ in their images too
}
SEEDS = (0, 1, 2, 3, 4)
FRACTIONS = (0.02, 0.05, 0.1, 0.3, 1)  # about 2, 7, 14, 43, 143 images of a class


def get_plan(name=""):
    sizes = {"width_divisor": 8, "layers": (1, 3, 5)}
    return chosen(name, small_plans("digits", CONFIG, OVERRIDES, SEEDS, FRACTIONS, **sizes, teacher="runs/digits"))
