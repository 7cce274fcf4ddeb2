"""A small ConViT on an image folder of 32 x 32 images, such as CIFAR-10.

    python train.py --config=configs/cifar10.py --config.data.dir=CIFAR10

Patches of 4 give an 8 x 8 grid. For a GPU; not run as it stands. What was run without one is
studies/cifar10.py:sample_efficiency_cpu: half an hour a run on one core.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.epochs = 100
    config.batch_size = 256
    config.model.name = "convit_tiny"
    config.model.image_size = 32
    config.model.patch_size = 4
    config.model.embed_dim = 96
    config.model.num_heads = 4
    config.model.depth = 6
    config.model.local_up_to_layer = 5
    config.model.dtype = "float32"
    config.optim.lr = 2e-3
    config.optim.schedule_per = "step"
    config.augment.crop = "pad"
    config.data.name = "folder"
    config.data.repeats = 1
    config.data.crop_ratio = 1.0
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.workers = 0
    return config
