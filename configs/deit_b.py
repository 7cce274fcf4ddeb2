"""DeiT-B on ImageNet, 300 epochs; the paper's top-1: 81.8.

python train.py --config=configs/deit_b.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "deit_base"
    return config
