"""A small ConViT on scikit-learn's handwritten digits: needs no download and no GPU.

    python train.py

Two to four minutes on two CPU cores, about 98 % top-1 (98.6, 98.1, 98.6 with seeds 0, 1, 2).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.epochs = 100
    config.batch_size = 128
    config.model.name = "convit_tiny"
    config.model.image_size = 8
    config.model.patch_size = 2
    config.model.embed_dim = 72
    config.model.num_heads = 9
    config.model.depth = 6
    config.model.local_up_to_layer = 5
    config.model.dtype = "float32"
    config.optim.lr = 8e-3
    config.optim.schedule_per = "step"
    config.augment.crop = "pad"
    config.augment.padding = 1
    config.augment.hflip = False
    config.augment.policy = "none"
    config.augment.erase_prob = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0
    config.data.name = "digits"
    config.data.repeats = 1
    config.data.crop_ratio = 1.0
    config.data.mean = (0.305, 0.305, 0.305)
    config.data.std = (0.376, 0.376, 0.376)
    config.data.workers = 0
    config.eval_batch_size = 360
    config.eval_every = 5.0
    config.log_every = 20
    return config
