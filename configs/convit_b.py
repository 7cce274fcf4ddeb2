"""ConViT-B on ImageNet, 300 epochs; the paper's top-1 (top-5): 82.4 (95.9).

python train.py --config=configs/convit_b.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "convit_base"
    return config
