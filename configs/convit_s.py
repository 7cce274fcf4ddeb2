"""ConViT-S on ImageNet, 300 epochs; the paper's top-1 (top-5): 81.3 (95.7).

python train.py --config=configs/convit_s.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "convit_small"
    return config
