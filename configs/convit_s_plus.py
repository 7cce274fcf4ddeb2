"""ConViT-S+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 82.2 (95.9).

python train.py --config=configs/convit_s_plus.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "convit_small_plus"
    config.optim.lr = 4e-4  # the paper trains the "plus" models with this rate and batch
    config.batch_size = 512
    return config
