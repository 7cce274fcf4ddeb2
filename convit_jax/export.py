"""Write a network as one file of StableHLO that runs without this package.

    python -m convit_jax.export --checkpoint=convit_small convit_small.stablehlo

Input: uint8 [batch, height, width, 3], images as they are after resizing and cropping; output: logits
float32 [batch, classes]; the batch is of any size. Normalisation and weights are inside, so that nobody has
to know them. In Python, with jax and flatbuffers alone:

    from jax import export
    logits = export.deserialize(open("convit_small.stablehlo", "rb").read()).call(images)
"""

from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.errors import UserError
from convit_jax.weights.writer import whole_file

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def define():
    define_weights()
    flags.DEFINE_list("platforms", ["cpu", "cuda"], f"Where it shall run, of {', '.join(PLATFORMS)}.")
    flags.DEFINE_bool("overwrite", False, "Replace OUTPUT if it exists.")


def main(arguments):
    """Export what the flags say."""
    if len(arguments) != 1:
        raise UserError(f"give one OUTPUT, not {len(arguments)} arguments; --help explains them.")
    unknown = [name for name in flags.FLAGS.platforms if name not in PLATFORMS]
    if unknown:
        raise UserError(f"there is no platform {unknown[0]!r}: choose of {', '.join(PLATFORMS)}.")
    output = Path(arguments[0]).expanduser()
    if output.exists() and not flags.FLAGS.overwrite:
        raise UserError(f"{output} exists: give another OUTPUT, or add --overwrite to replace it.")
    loaded = load_weights()
    exported = export(loaded, flags.FLAGS.platforms)
    with whole_file(output) as file:
        file.write(exported.serialize())
    (images,), (logits,) = exported.in_avals, exported.out_avals
    print(f"{output}: {images.str_short()} -> {logits.str_short()}, for {', '.join(exported.platforms)}")


def export(loaded, platforms):
    """The jax.export.Exported of a Pretrained: uint8 [b, H, W, C] -> logits float32 [b, classes].

    Without cuDNN's kernel and unrolled blocks, of which the format cannot hold the calls.
    """
    import jax
    from jax import export as jax_export

    from convit_jax.data.augment import normalize
    from convit_jax.weights.pretrained import behaving

    loaded = behaving(loaded, attention="xla", scan_unroll=1)
    model, how, s = loaded.model(), loaded.preprocessing, loaded.settings
    (batch,) = jax_export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *s["image_size"], s["in_chans"]), "uint8")
    network = jax.jit(lambda images: model(normalize(images, how.mean, how.std)))
    return jax_export.export(network, platforms=tuple(platforms))(images)


if __name__ == "__main__":
    launch("export", main, define=define, arguments="OUTPUT")
