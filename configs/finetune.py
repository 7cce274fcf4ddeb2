"""Fine-tuning on an image folder of 50 to 50,000 images (docs/finetuning.md).

    python train.py --config=configs/finetune.py --config.data.dir=FOLDER

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg. Starts from the published ConViT-Ti, downloaded once, or from any
other weights: --config.init_from=SOURCE. A linear probe: --config.optim.freeze=backbone --config.optim.lr=4e-2
"""

from configs import default


def get_config():
    config = default.get_config()
    config.epochs = 50
    config.batch_size = None
    config.init_from = "convit_tiny"
    config.model.dtype = "auto"
    config.model.name = None  # these are as in init_from
    config.model.image_size = None
    config.data.crop_ratio = None
    config.data.interpolation = None
    config.data.mean = None
    config.data.std = None
    config.optim.lr = 4e-3  # 5e-4 for a batch of 64
    config.optim.layer_decay = 0.7
    config.optim.min_lr = 1e-6
    config.optim.warmup_epochs = None
    config.optim.schedule_per = "step"
    config.optim.clip_norm = 1.0
    config.augment.policy = "none"
    config.augment.color_jitter = 0.3
    config.augment.erase_prob = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0
    config.data.name = "folder"
    config.data.repeats = 1
    config.data.workers = 2
    config.eval_batch_size = 256
    config.eval_every = 5.0
    config.log_every = 10
    return config
