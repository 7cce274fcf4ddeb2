"""The ablations of the paper's Table 3, ConViT-S+ on ImageNet, by the letter of the row.

    python train.py --config=configs/ablations.py:b --config.data.dir=IMAGENET

Rows: train gating, convolutional init, train GPSA, use GPSA -> top-1 on all data, on 10%.
a yes yes yes yes 82.2 59.7     b no  yes yes yes 82.0 57.4     c yes no  yes yes 81.4 56.9
d no  no  yes yes 81.6 54.6     e no  no  no  no  79.1 47.8     f no  yes no  yes 78.6 54.3
g no  no  no  yes 73.7 44.8
"""

from configs import convit_s_plus, deit_s_plus
from convit_jax.errors import UserError

# What each row changes in a ConViT; e is a DeiT.
FIXED = {"model.gate_init": 0.0, "optim.frozen": ("gating_param",)}  # in the middle, sigma(0) = 0.5
FROZEN = {"model.gate_init": 0.0, "optim.frozen": ("gpsa_blocks.attn",)}  # only the MLPs of GPSA blocks learn
RANDOM = {"model.conv_init": False}
CHANGES = {"a": {}, "b": FIXED, "c": RANDOM, "d": FIXED | RANDOM, "f": FROZEN, "g": FROZEN | RANDOM}
ROWS = ("a", "b", "c", "d", "e", "f", "g")


def get_config(row="a"):
    if row not in ROWS:
        raise UserError(f"there is no ablation {row!r}: choose one of {', '.join(ROWS)}, as in ablations.py:b.")
    if row == "e":
        return deit_s_plus.get_config()
    config = convit_s_plus.get_config()
    config.update_from_flattened_dict(CHANGES[row])
    return config
