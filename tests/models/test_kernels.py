"""Back ends, recomputation and unrolled scans change no number. XLA replaces cuDNN here."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from models.test_attention import assert_close

from convit_jax.models import kernels, vit
from convit_jax.models.variants import abstract_model, initial_params, model_settings

SMALL = dict(num_classes=7, image_size=(16, 24), patch_size=8, embed_dim=32, num_heads=4)
CONVIT = model_settings("convit_tiny", **SMALL, depth=4, local_up_to_layer=2)


def training_gradients(**way):
    """Loss and gradients with stochastic depth."""
    # The checked settings of a model refuse cuDNN in float32, which XLA takes.
    settings = {**CONVIT, "drop_path_rate": 0.3, **way}
    graphdef, _ = abstract_model(settings)
    images = jax.random.normal(jax.random.key(5), (3, 16, 24, 3))

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params)(images, key=jax.random.key(0)) ** 2)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(initial_params(CONVIT, 0)))


def test_no_way_to_compute_a_model_changes_its_gradients(xla_for_cudnn, monkeypatch):
    ways = ({}, {"remat": True, "scan_unroll": 4}, {"attention": "cudnn"})
    found = [training_gradients(**way) for way in ways]
    monkeypatch.setattr(vit, "_call", vit._call.__wrapped__)  # jit would give the trace of found[0]
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    expected = training_gradients()
    for gradients in found:
        assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


def test_cudnn_does_not_run_again_for_the_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "cudnn_available", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # the program is traced, not run
    graphdef, params = abstract_model({**CONVIT, "dtype": "bfloat16", "attention": "cudnn"})
    loss = jax.grad(lambda params, images: nnx.merge(graphdef, params)(images).sum())
    traced = str(jax.make_jaxpr(loss)(params, jax.ShapeDtypeStruct((2, 16, 24, 3), "float32")))
    # Once in the scan over the GPSA blocks and once in that over the plain blocks.
    assert traced.count("dot_product_attention_fwd_wrapper[") == 2
    assert traced.count("dot_product_attention_bwd_wrapper[") == 2


def test_without_an_nvidia_gpu_xla_computes_attention():
    assert kernels.choose_backend("cudnn") is kernels.choose_backend("xla") is kernels.XlaBackend


def test_gradients_in_bfloat16_over_many_tokens(xla_for_cudnn):
    pixels = jax.random.normal(jax.random.key(1), (256, 16, 24, 3)) + 0.3  # 256 x 6 tokens
    small = {**CONVIT, "depth": 2, "local_up_to_layer": 1}
    params, found = initial_params(small, 0), []
    for way in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "attention": "cudnn"}):
        graphdef, _ = abstract_model({**small, **way})

        def loss(params, graphdef=graphdef):
            return jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, params)(pixels))[:, 0])

        gradients = jax.jit(jax.grad(loss))(params)
        del gradients["gpsa_blocks"]["attn"]["pos_proj"]["bias"]  # softmax cancels it
        found.append(gradients)
    for gradients in found[1:]:
        for (path, exact), rounded in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(gradients), strict=True):
            error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
            assert error < 0.04, (jax.tree_util.keystr(path), float(error))
            if rounded.size > 100:  # sums over all tokens are not rounded to bfloat16
                same = np.mean(rounded == rounded.astype(jnp.bfloat16))
                assert same < 0.1, (jax.tree_util.keystr(path), float(same))
