"""DeiT-S on ImageNet, 300 epochs; the paper's top-1: 79.8.

python train.py --config=configs/deit_s.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "deit_small"
    return config
