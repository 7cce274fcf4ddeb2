"""One vision transformer for ConViT and DeiT.

The first `local_up_to_layer` blocks are GPSA and see the patches only; then the class
token joins, and plain self-attention follows (ConViT, Fig. 4). With 0 GPSA blocks, query,
key and value biases and a position embedding for the class token it is DeiT; `distilled`
adds DeiT's distillation token, which goes beside the class token and has a head of its own.
Equal blocks hold their parameters stacked along a leading axis [L, ...] and run under
`jax.lax.scan`; `model.blocks[i]` gives one of them by its number in the original. Of the last
block only the tokens that have a head are computed.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from convit_jax.models import kernels
from convit_jax.models.attention import GatedPositionalSelfAttention, SelfAttention
from convit_jax.models.layers import (
    TRUNC_NORMAL,
    Linear,
    drop_path,
    dropout,
    gelu,
    layer_norm,
    product,
    split_key,
)

# What a block keeps for the gradient besides its input: all that a matrix product gave, but for the scores
# of attention and the position, which is in its sum with the content ("mixed"). What is cheap is computed
# again: norms, GELU, softmax.
KEPT = ("qkv", "attention", "mixed", "middle", "hidden")

KEEP = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(*KEPT), kernels.keep
)


class PatchEmbed(nnx.Module):
    """Images [B, H, W, C] -> patches float32 [B, rows * columns, D]: a convolution, its stride its size."""

    def __init__(self, patch_size, in_chans, embed_dim, *, dtype, rngs):
        bound = (patch_size * patch_size * in_chans) ** -0.5  # PyTorch's default for convolutions

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        size = (patch_size, patch_size)
        self.proj = nnx.Conv(
            in_chans,
            embed_dim,
            size,
            strides=size,
            padding="VALID",
            kernel_init=uniform,
            bias_init=uniform,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images):
        """As one matrix product: the gradient of the convolution is slow on a CPU."""
        batch, height, width, channels = images.shape
        rows, columns = self.proj.kernel_size
        patches = images.reshape(batch, height // rows, rows, width // columns, columns, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, rows * columns * channels)
        kernel = self.proj.kernel[...]
        return product(patches, kernel.reshape(-1, kernel.shape[-1])) + self.proj.bias[...]


class Mlp(nnx.Module):
    """fc2(gelu(fc1(x))), GELU in its exact form, as the original's."""

    def __init__(self, dim, hidden_dim, *, drop=0.0, dtype, rngs):
        self.drop = drop
        self.fc1 = Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, key=None):
        keys = split_key(key, 2)
        hidden = checkpoint_name(self.fc1(x), "hidden")
        x = dropout(gelu(hidden), self.drop, keys[0])
        return dropout(self.fc2(x), self.drop, keys[1])


class Block(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): [B, N, D] -> [B, N, D]."""

    def __init__(self, dim, attn, mlp_ratio, *, drop=0.0, dtype, rngs):
        self.norm1 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, dtype=dtype, rngs=rngs)
        self.attn = attn(rngs=rngs)  # last, so that the MLP starts the same beside either attention

    def __call__(self, x, *, queries=None, drop_path_rate=None, key=None):
        """queries: give so many of the first tokens only, [B, queries, D]; not with GPSA."""
        attn_key, path1_key, mlp_key, path2_key = split_key(key, 4)
        attn = self.attn if queries is None else functools.partial(self.attn, queries=queries)
        x = x[:, :queries] + drop_path(attn(self.norm1(x), key=attn_key), drop_path_rate, path1_key)
        x = checkpoint_name(x, "middle")
        return x + drop_path(self.mlp(self.norm2(x), key=mlp_key), drop_path_rate, path2_key)


class VisionTransformer(nnx.Module):
    """ConViT or DeiT: images float32 [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Args:
      image_size: (H, W) in pixels. patch_size: side of a patch, divides both.
      in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio: the usual sizes.
      qkv_bias: biases of query, key, value (DeiT).
      local_up_to_layer: number of GPSA blocks before the class token joins, 0 to depth - 1.
      pos_embed_class_token: the position embedding has an entry for the class token (DeiT), and for the
        distillation token.
      distilled: a distillation token with its own head; logits are the mean of both heads.
      conv_init, locality_strength, gate_init: see GatedPositionalSelfAttention.
      drop_rate, attn_drop_rate: dropout. drop_path_rate: of the last block, rising linearly from 0.
      attention: "xla", or "cudnn": its fused kernel, which takes bfloat16, where there is an NVIDIA GPU from
        Ampere on (elsewhere as "xla", the same up to rounding), but for training with attn_drop_rate.
      dtype: "float32" or "bfloat16", of the arithmetic and of the tokens between blocks, with the scale and
        bias of the blocks' norms; parameters, softmax, gates, the statistics of norms, the last norm and the
        logits are float32, and so are the gradients of parameters.
      remat: recompute whole blocks in the backward pass, for memory; without it only what is cheap.
      scan_unroll: how many blocks the scan lays out in a row; depth unrolls it.
    """

    def __init__(
        self,
        *,
        image_size,
        patch_size,
        in_chans,
        num_classes,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        qkv_bias,
        local_up_to_layer,
        pos_embed_class_token,
        distilled,
        conv_init,
        locality_strength,
        gate_init,
        attention,
        drop_rate,
        attn_drop_rate,
        drop_path_rate,
        dtype,
        remat,
        scan_unroll,
        rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.image_size, self.patch_size, self.in_chans = image_size, patch_size, in_chans
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.depth, self.local_up_to_layer, self.dtype = depth, local_up_to_layer, dtype
        self.distilled = distilled
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.remat, self.scan_unroll = remat, scan_unroll

        def gpsa(rngs):
            return GatedPositionalSelfAttention(
                embed_dim,
                num_heads,
                self.grid,
                qkv_bias=qkv_bias,
                conv_init=conv_init,
                locality_strength=locality_strength,
                gate_init=gate_init,
                attention=attention,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                dtype=dtype,
                rngs=rngs,
            )

        def plain(rngs):
            return SelfAttention(
                embed_dim,
                num_heads,
                qkv_bias=qkv_bias,
                attention=attention,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                dtype=dtype,
                rngs=rngs,
            )

        block_key = rngs.params()

        def stack(attn, numbers):
            """Blocks with these numbers as one Block whose parameters lead with an axis [L]."""
            if not numbers:
                return None
            keys = jnp.stack([jax.random.fold_in(block_key, number) for number in numbers])
            return nnx.vmap(
                lambda key: Block(
                    embed_dim, attn, mlp_ratio, drop=drop_rate, dtype=dtype, rngs=nnx.Rngs(params=key)
                )
            )(keys)

        extra_tokens = 2 if distilled else 1
        positions = self.grid[0] * self.grid[1] + extra_tokens * int(pos_embed_class_token)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(TRUNC_NORMAL(rngs.params(), (1, positions, embed_dim)))
        self.cls_token = nnx.Param(TRUNC_NORMAL(rngs.params(), (1, 1, embed_dim)))
        self.gpsa_blocks = stack(gpsa, range(local_up_to_layer))
        self.sa_blocks = stack(plain, range(local_up_to_layer, depth))
        self.norm = layer_norm(embed_dim, dtype=jnp.float32, rngs=rngs)
        self.head = Linear(embed_dim, num_classes, dtype=jnp.float32, rngs=rngs)
        if distilled:
            self.dist_token = nnx.Param(TRUNC_NORMAL(rngs.params(), (1, 1, embed_dim)))
            self.head_dist = Linear(embed_dim, num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def blocks(self):
        """The blocks by their number in the original: copies, to read; writing to them changes nothing."""
        return [self._block(number) for number in range(self.depth)]

    def _block(self, number):
        local = number < self.local_up_to_layer
        stack, index = (
            (self.gpsa_blocks, number) if local else (self.sa_blocks, number - self.local_up_to_layer)
        )
        graphdef, params = nnx.split(stack)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))

    def _embed(self, images, key):
        """Patches [B, N, D], class (and distillation) token [B, 1 or 2, D], with their position embedding."""
        if images.ndim != 4 or images.shape[1:] != (*self.image_size, self.in_chans):
            expected = (*self.image_size, self.in_chans)
            raise ValueError(
                f"images are {list(images.shape)}, this model takes [B, {', '.join(map(str, expected))}]: "
                "resize them, or create the model with another image_size"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}, this model takes normalised floats: convert them")
        patches_key, tokens_key = split_key(key, 2)
        patches = self.patch_embed(images.astype(self.dtype))  # float32, for the gradients of what is added
        patches = (patches + self.pos_embed[:, -patches.shape[1] :]).astype(self.dtype)
        tokens = self.cls_token[...]
        if self.distilled:
            tokens = jnp.concatenate([tokens, self.dist_token[...]], axis=1)
        if self.pos_embed.shape[1] > patches.shape[1]:
            tokens = tokens + self.pos_embed[:, : tokens.shape[1]]
        tokens = jnp.broadcast_to(tokens, (images.shape[0], *tokens.shape[1:])).astype(self.dtype)
        if self.local_up_to_layer == 0:  # the original's ConViT drops the patches only
            tokens = dropout(tokens, self.drop_rate, tokens_key)
        return dropout(patches, self.drop_rate, patches_key), tokens

    def _run(self, stack, first, x, key, queries=None):
        """Scan x [B, N, D] through a stack whose first block has the number `first`.

        queries: the last block gives so many of the first tokens only, [B, queries, D].
        """
        if stack is None:
            return x
        graphdef, params = nnx.split(stack)
        count = jax.tree.leaves(params)[0].shape[0]
        numbers = jnp.arange(first, first + count)
        rates = None
        if self.drop_path_rate > 0:
            rates = self.drop_path_rate * numbers / max(self.depth - 1, 1)
        layers = (params, numbers, rates)

        def body(queries, x, layer):
            params, number, rate = layer
            block_key = None if key is None else jax.random.fold_in(key, number)
            block = nnx.merge(graphdef, params)
            return block(x, queries=queries, drop_path_rate=rate, key=block_key), None

        def step(queries):
            whole = functools.partial(body, queries)
            policy = None if self.remat else KEEP
            # What is recomputed must not be shared with the forward pass; in a loop it cannot be.
            alone = queries is not None or self.scan_unroll >= count
            return jax.checkpoint(whole, prevent_cse=alone, policy=policy)

        scanned = layers if queries is None else jax.tree.map(lambda leaf: leaf[:-1], layers)
        x, _ = jax.lax.scan(step(None), x, scanned, unroll=min(self.scan_unroll, count))
        if queries is None:
            return x
        return step(queries)(x, jax.tree.map(lambda leaf: leaf[-1], layers))[0]

    def _final_tokens(self, images, key):
        """Class (and distillation) token after the last norm, float32 [B, 1 or 2, D]."""
        embed_key, block_key = split_key(key, 2)
        x, tokens = self._embed(images, embed_key)
        x = self._run(self.gpsa_blocks, 0, x, block_key)
        x = jnp.concatenate([tokens, x], axis=1)
        if self.scan_unroll > 1:
            # Where no loop holds it to this layout, XLA for a GPU puts the batch last and transposes tokens
            # in every block (docs/performance.md).
            x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))
        return self.norm(self._run(self.sa_blocks, self.local_up_to_layer, x, block_key, tokens.shape[1]))

    def features(self, images, *, key=None):
        """Class token after the last norm, float32 [B, D]. Arguments as for a call."""
        return self._final_tokens(images, key)[:, 0]

    def both_logits(self, images, *, key=None):
        """(logits of the class token, logits of the distillation token), float32 [B, num_classes] each.

        For a distilled model: in training the first learn the labels, the second the teacher.
        """
        tokens = self._final_tokens(images, key)
        return self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])

    def __call__(self, images, *, key=None):
        """Logits, float32 [B, num_classes]. key: of dropout and stochastic depth, None in evaluation."""
        if self.distilled:
            class_logits, distillation_logits = self.both_logits(images, key=key)
            return (class_logits + distillation_logits) / 2
        return self.head(self.features(images, key=key))

    def attention_maps(self, images):
        """List over blocks of attention, float32 [B, H, N, N]; once it joined, the class token is token 0,
        the distillation token token 1.
        """
        stacks = self.map_attention(images, lambda attn, x: attn.attention_maps(x))
        return [maps for stack in stacks for maps in stack]

    def map_attention(self, images, function):
        """function(attn, x) of every attention layer and the normalised tokens x [B, N, D] that enter it.

        Returns:
          A list of one or two trees: what it gave, stacked over the GPSA blocks if there are any, and over
          the plain ones, whose first tokens are those of class and distillation.
        """

        def step(graphdef, x, params):
            block = nnx.merge(graphdef, params)
            return block(x), function(block.attn, block.norm1(x))

        x, tokens = self._embed(images, None)
        results = []
        for stack in (self.gpsa_blocks, self.sa_blocks):
            if stack is self.sa_blocks:
                x = jnp.concatenate([tokens, x], axis=1)
            if stack is not None:
                graphdef, params = nnx.split(stack)
                x, found = jax.lax.scan(functools.partial(step, graphdef), x, params)
                results.append(found)
        return results
