"""DeiT-Ti on ImageNet, 300 epochs; the paper's top-1: 72.2.

python train.py --config=configs/deit_ti.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "deit_tiny"
    return config
