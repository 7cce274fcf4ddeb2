"""Every field of a training, once, with its meaning and the value of the paper's recipe.

The other files change a few of them. Any field can be changed on the command line:
    python train.py --config=configs/convit_s.py --config.data.dir=IMAGENET --config.batch_size=512
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config():
    """ImageNet from scratch as in the ConViT paper (section 3 and DeiT's Table 9)."""
    config = ConfigDict()
    config.seed = 0  # of weights, order of images, augmentation; same seed, same numbers
    config.epochs = 300  # times that the subset is shown
    config.steps = placeholder(int)  # stop after so many steps; the schedule stays that of `epochs`
    config.batch_size = 1024  # images a step, over all devices and processes
    config.accumulate = 1  # do a step in so many micro-batches, for memory

    config.init_from = placeholder(str)  # start from these weights: whatever convit_jax.load_pretrained takes

    config.model = ConfigDict()  # the arguments of convit_jax.create_model; None: the model's own
    config.model.name = "convit_small"  # one of convit_jax.list_models()
    config.model.image_size = FieldReference(224, field_type=object)  # pixels; (height, width) if oblong
    config.model.num_classes = placeholder(int)  # None: as many as the data has
    config.model.patch_size = placeholder(int)  # 16
    config.model.embed_dim = placeholder(int)  # by name
    config.model.depth = placeholder(int)  # 12
    config.model.num_heads = placeholder(int)  # by name
    config.model.mlp_ratio = placeholder(float)  # 4
    config.model.qkv_bias = placeholder(bool)  # ConViT no, DeiT yes
    config.model.local_up_to_layer = placeholder(int)  # number of GPSA blocks: ConViT 10, DeiT 0
    config.model.pos_embed_class_token = placeholder(bool)  # ConViT no, DeiT yes: it has an entry
    config.model.distilled = placeholder(bool)  # no: a distillation token beside the class token (DeiT)
    config.model.conv_init = placeholder(bool)  # start GPSA as a convolution
    config.model.locality_strength = placeholder(float)  # 1: alpha of the convolutional init
    config.model.gate_init = placeholder(float)  # 1: gating parameter lambda of every head
    config.model.attention = "xla"  # or "cudnn": its fused kernel, on NVIDIA GPUs with bfloat16
    config.model.drop_rate = placeholder(float)  # 0
    config.model.attn_drop_rate = placeholder(float)  # 0; above 0, attention takes its slow explicit form
    config.model.drop_path_rate = 0.1  # stochastic depth of the last block
    config.model.dtype = "bfloat16"  # of the arithmetic, or float32
    config.model.remat = False  # recompute blocks in the backward pass, for memory
    config.model.scan_unroll = 1  # blocks laid out in a row by the scan

    config.optim = ConfigDict()  # AdamW
    config.optim.lr = 5e-4  # for 512 images; multiplied by batch_size / 512
    config.optim.min_lr = 1e-5  # at the end; not multiplied
    config.optim.warmup_lr = 1e-6  # at the start; not multiplied
    config.optim.warmup_epochs = 5.0  # of the subset
    config.optim.schedule_per = "epoch"  # "epoch": changes once an epoch, as the original; or "step"
    config.optim.weight_decay = 0.05  # not on biases, norms and gates
    config.optim.b1 = 0.9  # decay of the mean of the gradient
    config.optim.b2 = 0.999  # decay of the mean of its square
    config.optim.eps = 1e-8  # added to the root of that
    config.optim.clip_norm = 0.0  # clip the global norm of the gradient; 0: do not
    config.optim.ema_decay = 0.0  # keep a moving average of the weights too; 0: do not
    config.optim.frozen = ()  # parts of parameter names that are not trained, as "gating_param"

    config.augment = ConfigDict()  # of training images
    config.augment.crop = "resized"  # "resized": random resized crop; "pad": shift by up to `padding` pixels
    config.augment.padding = 4  # pixels of the shift with crop = "pad"
    config.augment.hflip = True  # mirror half of the images
    config.augment.policy = "randaugment"  # or "three_augment" (DeiT III), or "none"
    config.augment.num_ops = 2  # operations of RandAugment drawn for an image, each applied to half of them
    config.augment.magnitude = 9.0  # of RandAugment's operations, 0 to 10
    config.augment.magnitude_std = 0.5  # of a normal variable added to it for each operation
    config.augment.color_jitter = 0.0  # brightness, contrast, saturation by 1 +- this; 0: off. DeiT III: 0.3
    config.augment.erase_prob = 0.25  # of replacing a box of the image with noise
    config.augment.mixup = 0.8  # alpha; 0: off
    config.augment.cutmix = 1.0  # alpha; 0: off
    config.augment.mix_prob = 1.0  # of mixing a batch at all
    config.augment.mix_switch_prob = 0.5  # of cutmix where both are on
    config.augment.label_smoothing = 0.1  # share of the label spread over all classes

    config.data = ConfigDict()  # which images, and how they are read
    config.data.name = "imagenet2012"  # a TFDS name; or folder: DIR/{train,val}/CLASS/*.jpg; or digits
    config.data.dir = placeholder(str)  # TFDS's directory (None: $TFDS_DATA_DIR) or the folder
    config.data.sampling_ratio = 1.0  # fraction of each class to train on
    config.data.subset_rule = "first"  # "first" names of each class, as the original; or "random", nested
    config.data.num_classes = placeholder(int)  # keep the first classes only
    config.data.keep_total_images = False  # multiply epochs by all images / images kept (Table 2)
    config.data.repeats = 3  # repeated augmentation: each image so many times in a row
    config.data.crop_ratio = 0.875  # evaluation: 224 / 256, the centre of the resized image
    config.data.mean = (0.485, 0.456, 0.406)  # of ImageNet, of pixels in 0..1
    config.data.std = (0.229, 0.224, 0.225)  # likewise
    config.data.max_unreadable = 10  # images that may fail: replaced in training, left out in the test
    config.data.workers = 8  # loader processes; 0: threads of the training process. Changes no number

    config.distill = ConfigDict()  # learning from a teacher beside the labels (Table 4)
    config.distill.teacher = placeholder(str)  # whatever convit_jax.load_pretrained takes; None: no teacher
    config.distill.kind = "hard"  # learn the class that it gives; or "soft": its probabilities
    config.distill.alpha = 0.5  # share of the teacher in the loss, 0 to 1
    config.distill.temperature = 1.0  # of both softmaxes with kind = "soft"

    config.locality = ConfigDict()  # of what attention looks at, measured at every evaluation
    config.locality.images = placeholder(int)  # of the test: None 1 in 100, at most 64; 0 no non-locality
    config.locality.as_logged = False  # non-locality also as the original logs it, on the raw patch embedding

    config.mesh = ConfigDict()  # how devices are arranged
    config.mesh.data = -1  # devices that share a batch; -1: all
    config.mesh.fsdp = 1  # devices that also share the parameters and the optimizer's state

    config.eval_batch_size = 1024  # over all devices; every image counts once at any size
    config.eval_every = 1.0  # epochs; of the whole set with data.keep_total_images
    config.checkpoint_every = 1000  # steps; evaluation and the end save as well
    config.log_every = 50  # steps
    config.compilation_cache = "~/.cache/convit_jax/compiled"  # empty: none; several processes: RUN/compiled
    return config.lock()  # a mistyped field, here or in another file, is an error
