"""ConViT-Ti on ImageNet, 300 epochs; the paper's top-1 (top-5): 73.1 (91.7).

python train.py --config=configs/convit_ti.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "convit_tiny"
    return config
