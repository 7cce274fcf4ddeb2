"""DeiT-B+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 77.5 (93.5).

python train.py --config=configs/deit_b_plus.py --config.data.dir=IMAGENET
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "deit_base_plus"
    config.optim.lr = 4e-4  # the paper trains the "plus" models with this rate and batch
    config.batch_size = 512
    return config
