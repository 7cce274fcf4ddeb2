"""Every field of a training: its default (the recipe of the ConViT paper), meaning and allowed values.

The other config files change some of them. You can change any field on the command line:
    python train.py --config=configs/convit_s.py --config.data.dir=IMAGENET --config.batch_size=512

An interval such as "(0, 1]" excludes 0 and includes 1. None leaves the choice to the program, as described.
A run may continue with another value of a field marked `may_change`.
"""

from ml_collections import ConfigDict

from convit_jax.config import Field, make_config

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

FIELDS = {
    "seed": Field(0, "seed of weights, image order and augmentation", "[0, 4294967295]"),
    "epochs": Field(300, "passes over the training images", "(0, inf)"),
    "steps": Field(
        None,
        "stop after this many steps; the schedule stays that of `epochs`",
        "[1, inf)",
        kind=int,
        may_change=True,
    ),
    "batch_size": Field(
        1024,
        "images per step, over all devices and processes; None: 64, or the largest multiple of 8 in a smaller set",
        "[1, inf)",
        kind=int,
    ),
    "accumulate": Field(1, "micro-batches per step; more need less memory", "[1, inf)"),
    "init_from": Field(None, "start from these weights: a source of convit_jax.load_pretrained", kind=str),
    # The arguments of convit_jax.create_model; None: the model's own value.
    "model.name": Field(
        "convit_small", "one of convit_jax.list_models(); None: the network of init_from, with its sizes", kind=str
    ),
    "model.image_size": Field(224, "pixels: a side, (height, width) or HEIGHTxWIDTH", kind=object),
    "model.num_classes": Field(None, "size of the head; None: the number of classes of the data", "[1, inf)", kind=int),
    "model.patch_size": Field(None, "pixels; 16", "[1, inf)", kind=int),
    "model.embed_dim": Field(None, "width; depends on the name", "[1, inf)", kind=int),
    "model.depth": Field(None, "number of blocks; 12", "[1, inf)", kind=int),
    "model.num_heads": Field(None, "attention heads; depends on the name", "[1, inf)", kind=int),
    "model.mlp_ratio": Field(None, "hidden width of the MLP / embed_dim; 4", "(0, inf)", kind=float),
    "model.qkv_bias": Field(None, "biases of query, key and value; ConViT False, DeiT True", kind=bool),
    "model.local_up_to_layer": Field(None, "number of GPSA blocks; ConViT 10, DeiT 0", "[0, inf)", kind=int),
    "model.pos_embed_class_token": Field(
        None, "position embedding for the class token too; ConViT False, DeiT True", kind=bool
    ),
    "model.distilled": Field(None, "add DeiT's distillation token; False", kind=bool),
    "model.conv_init": Field(None, "convolutional init of GPSA; True", kind=bool),
    "model.locality_strength": Field(None, "alpha of the convolutional init; 1", "(-inf, inf)", kind=float),
    "model.gate_init": Field(None, "gating parameter lambda of every head at the start; 1", "(-inf, inf)", kind=float),
    "model.attention": Field(
        "auto",
        "cudnn: fused kernel for bfloat16 on NVIDIA GPUs; auto: the faster one, tried at the start",
        ("auto", "xla", "cudnn"),
        may_change=True,
    ),
    "model.drop_rate": Field(None, "dropout; 0", "[0, 1)", kind=float),
    "model.attn_drop_rate": Field(
        None,
        "dropout of attention maps; 0; above 0, attention takes its slow explicit form",
        "[0, 1)",
        kind=float,
    ),
    "model.drop_path_rate": Field(0.1, "stochastic depth of the last block, rising linearly from 0", "[0, 1)"),
    "model.dtype": Field(
        "bfloat16",
        "dtype of the computation; parameters are float32; auto: bfloat16, on a CPU float32",
        ("float32", "bfloat16", "auto"),
    ),
    "model.remat": Field(False, "recompute blocks in the backward pass to save memory", may_change=True),
    "model.scan_unroll": Field(
        "auto", "number of blocks that the scan unrolls; auto: all with cudnn, else 1", kind=object, may_change=True
    ),
    # AdamW and its schedule.
    "optim.lr": Field(5e-4, "peak learning rate for 512 images; multiplied by batch_size / 512", "[0, inf)"),
    "optim.min_lr": Field(1e-5, "learning rate at the end; not multiplied", "[0, inf)"),
    "optim.warmup_lr": Field(1e-6, "learning rate at the start; not multiplied", "[0, inf)"),
    "optim.warmup_epochs": Field(5.0, "length of the linear warm-up; None: 1/20 of `epochs`", "[0, inf)", kind=float),
    "optim.schedule_per": Field(
        "epoch", "change the rate once per epoch, as the original, or per step", ("epoch", "step")
    ),
    "optim.weight_decay": Field(0.05, "decoupled weight decay; not applied to biases, norms and gates", "[0, inf)"),
    "optim.b1": Field(0.9, "decay of the mean of the gradient", "[0, 1)"),
    "optim.b2": Field(0.999, "decay of the mean of its square", "[0, 1)"),
    "optim.eps": Field(1e-8, "added to the root of the mean square", "[0, inf)"),
    "optim.clip_norm": Field(0.0, "maximum global norm of the gradient; 0: no clipping", "[0, inf)"),
    "optim.ema_decay": Field(0.0, "decay of a moving average of the weights; 0: none", "[0, 1)"),
    "optim.frozen": Field((), 'parameters that are not trained: parts of their names, such as ("gating_param",)'),
    "optim.freeze": Field(
        "none",
        "more that is not trained: backbone (all but the head), or a number: embeddings and as many leading blocks",
        kind=object,
    ),
    "optim.layer_decay": Field(
        1.0, "learning rate of a layer / that of the next; last norm and head have the full rate", "(0, 1]"
    ),
    # Augmentation of training images.
    "augment.crop": Field("resized", "random resized crop; pad: shift by up to `padding` pixels", ("resized", "pad")),
    "augment.padding": Field(4, "pixels, with crop = pad", "[0, inf)"),
    "augment.hflip": Field(True, "mirror half of the images"),
    "augment.policy": Field("randaugment", "three_augment is DeiT III's", ("randaugment", "three_augment", "none")),
    "augment.num_ops": Field(2, "operations of RandAugment per image, each applied with probability 0.5", "[1, 15]"),
    "augment.magnitude": Field(9.0, "magnitude of RandAugment's operations", "[0, 10]"),
    "augment.magnitude_std": Field(0.5, "standard deviation of the magnitude", "[0, 10]"),
    "augment.color_jitter": Field(
        0.0, "range of brightness, contrast and saturation around 1; 0: off; DeiT III: 0.3", "[0, 1]"
    ),
    "augment.erase_prob": Field(0.25, "probability of random erasing", "[0, 1]"),
    "augment.mixup": Field(0.8, "alpha of mixup; 0: off", "[0, inf)"),
    "augment.cutmix": Field(1.0, "alpha of cutmix; 0: off", "[0, inf)"),
    "augment.mix_prob": Field(1.0, "probability of mixing a batch", "[0, 1]"),
    "augment.mix_switch_prob": Field(0.5, "probability of cutmix where both are on", "[0, 1]"),
    "augment.label_smoothing": Field(0.1, "share of the label spread over all classes", "[0, 1)"),
    # The images.
    "data.name": Field("imagenet2012", "a TFDS dataset; folder: DIR/{train,val}/CLASS/*.jpg; or digits"),
    "data.dir": Field(None, "TFDS directory (None: $TFDS_DATA_DIR) or image folder", kind=str, may_change=True),
    "data.sampling_ratio": Field(1.0, "fraction of each class to train on", "(0, 1]"),
    "data.subset_rule": Field(
        "first", "first names of each class, as the original, or a random, nested subset", ("first", "random")
    ),
    "data.num_classes": Field(None, "keep only the first classes", "[1, inf)", kind=int),
    "data.keep_total_images": Field(False, "multiply epochs by all images / images kept (Table 2)"),
    "data.repeats": Field(3, "repeated augmentation: consecutive copies of each image", "[1, inf)"),
    # None in the next four: as the weights of init_from.
    "data.crop_ratio": Field(
        0.875, "evaluation: side of the centre crop / short side of the resized image", "(0, 1]", kind=float
    ),
    "data.interpolation": Field("bicubic", "Pillow's filter that resizes images", FILTERS, kind=str),
    "data.mean": Field(
        (0.485, 0.456, 0.406), "mean of red, green and blue, for pixels in 0..1", "(-inf, inf)", kind=tuple
    ),
    "data.std": Field((0.229, 0.224, 0.225), "standard deviation per channel, same scale", "(0, inf)", kind=tuple),
    "data.resize": Field(
        "auto",
        "who crops and resizes: the host; or the device, of images that the host has only decoded; auto: the device "
        "if it is not a CPU and augment.crop is resized; changes pixels by at most 2 of 255",
        ("auto", "host", "device"),
        may_change=True,
    ),
    "data.canvas": Field(
        None,
        "with resize = device: side in pixels of the squares that carry images; the host resizes those that do not "
        "fit; None: 512, or what `repeats` crops need if that is more",
        "[1, inf)",
        kind=int,
        may_change=True,
    ),
    "data.max_unreadable": Field(
        10,
        "unreadable images allowed: replaced in training, skipped in evaluation",
        "[0, inf)",
        may_change=True,
    ),
    "data.workers": Field(
        8,
        "loader processes; 0: threads of the training process; does not affect results",
        "[0, inf)",
        may_change=True,
    ),
    # Learning from a teacher (Table 4).
    "distill.teacher": Field(None, "a source of load_pretrained; None: no teacher", kind=str, may_change=True),
    "distill.kind": Field("hard", "learn the teacher's class, or its probabilities", ("hard", "soft")),
    "distill.alpha": Field(0.5, "weight of the teacher in the loss", "[0, 1]"),
    "distill.temperature": Field(1.0, "temperature of both softmaxes, with kind = soft", "(0, inf)"),
    # What is measured of attention at every evaluation.
    "locality.images": Field(
        None,
        "test images for non-locality, all on every device; None: 1 in 100, at most 64; 0: off",
        "[0, inf)",
        kind=int,
        may_change=True,
    ),
    "locality.as_logged": Field(
        False, "non-locality also as the original logs it, on the raw patch embedding", may_change=True
    ),
    # Devices.
    "mesh.data": Field(-1, "devices that share a batch; -1: all", "[-1, inf)", may_change=True),
    "mesh.fsdp": Field(1, "devices that also share parameters and optimizer state", "[1, inf)", may_change=True),
    "eval_batch_size": Field(
        1024,
        "images per evaluation step over all devices, rounded up to a multiple of them; does not affect results",
        "[1, inf)",
        may_change=True,
    ),
    "eval_every": Field(
        1.0,
        "epochs between evaluations; of the whole training set with data.keep_total_images",
        "(0, inf)",
        may_change=True,
    ),
    "checkpoint_every": Field(
        1000, "steps between checkpoints; evaluations and the end also save one", "[1, inf)", may_change=True
    ),
    "log_every": Field(50, "steps between lines of the training log", "[1, inf)"),
    "compilation_cache": Field(
        "~/.cache/convit_jax/compiled",
        "folder of compiled programs; empty: none; several processes use RUN/compiled",
        may_change=True,
    ),
}


def get_config(model: str = "convit_small") -> ConfigDict:
    """Returns the config of a model for ImageNet from scratch (ConViT, section 3; DeiT, Table 9)."""
    config = make_config(FIELDS)
    config.model.name = model
    if model.endswith("_plus"):  # the paper trains these with another rate and batch
        config.optim.lr, config.batch_size = 4e-4, 512
    return config
