"""Write a network as one file of StableHLO that runs without this package.

    python -m convit_jax.export --checkpoint=convit_small convit_small.stablehlo

Input: uint8 [batch, height, width, 3], resized and cropped images; output: logits float32 [batch,
classes]; any batch size. The file contains the weights and the normalisation. It needs only jax and
flatbuffers:

    from jax import export
    logits = export.deserialize(open("convit_small.stablehlo", "rb").read()).call(images)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.errors import UserError
from convit_jax.rundir import atomic_write, disk_errors

if TYPE_CHECKING:
    import jax.export

    from convit_jax.weights.formats import Pretrained

OTHERS = (".onnx", ".pb", ".pt", ".pth", ".safetensors", ".tflite")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _define_flags() -> None:
    define_weights()
    flags.DEFINE_list("platforms", ["cpu", "cuda"], f"Where the file can run, of {', '.join(PLATFORMS)}.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing OUTPUT.")


def main(arguments: list[str]) -> None:
    """Exports the weights that the flags name to OUTPUT."""
    if unknown := [name for name in flags.FLAGS.platforms if name not in PLATFORMS]:
        raise UserError(f"there is no platform {unknown[0]!r}: choose from {', '.join(PLATFORMS)}.")
    output = Path(arguments[0]).expanduser()
    if output.suffix in OTHERS:
        raise UserError(f"export writes StableHLO, not {output.suffix}: name it {output.with_suffix('.stablehlo')}.")
    if output.exists() and not flags.FLAGS.overwrite:
        raise UserError(f"{output} exists: give another OUTPUT, or add --overwrite to replace it.")
    exported = export(load_weights(), flags.FLAGS.platforms)
    with disk_errors(output), atomic_write(output, "wb") as file:
        file.write(exported.serialize())
    (images,), (logits,) = exported.in_avals, exported.out_avals
    print(f"{output}: {images.str_short()} -> {logits.str_short()}, for {', '.join(exported.platforms)}")


def export(loaded: "Pretrained", platforms: list[str]) -> "jax.export.Exported":
    """Returns the exported network: uint8 [b, H, W, C] -> logits float32 [b, classes]."""
    import jax
    from jax import export as jax_export

    from convit_jax.data.augment import normalize
    from convit_jax.weights.pretrained import with_behaviour

    loaded = with_behaviour(loaded, attention="xla", scan_unroll=1)  # the format cannot hold cuDNN's kernel
    model, how, s = loaded.model(), loaded.preprocessing, loaded.settings
    images = jax.ShapeDtypeStruct((*jax_export.symbolic_shape("b"), *s["image_size"], s["in_chans"]), "uint8")
    network = jax.jit(lambda images: model(normalize(images, how.mean, how.std)))
    return jax_export.export(network, platforms=tuple(platforms))(images)


if __name__ == "__main__":
    launch("export", main, define=_define_flags, arguments="OUTPUT")
