"""One vision transformer for ConViT and DeiT.

The first `local_up_to_layer` blocks are GPSA and see the patches only. Then the class token joins, and plain
self-attention follows (ConViT, Fig. 4). Without GPSA blocks, with biases of queries, keys and values and a
position embedding of the class token it is DeiT; `distilled` adds DeiT's distillation token and its head.

Blocks of one kind hold their parameters stacked along a leading axis [L, ...] and run under `jax.lax.scan`,
which compiles faster and on a CPU trains faster than a loop in Python. `model.blocks[i]` gives a block by its
number in the original. The last block computes only the tokens that have a head.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from convit_jax.models.attention import GatedPositionalSelfAttention, SelfAttention
from convit_jax.models.initializers import stacked, trunc_normal
from convit_jax.models.kernels import KEEP_PRODUCTS
from convit_jax.models.layers import Key, Linear, Mlp, PatchEmbed, drop_path, dropout, layer_norm, split_key

Settings = dict[str, Any]  # all settings of a VisionTransformer by name; also stored as JSON
Method = TypeVar("Method", bound=Callable[..., Any])


@functools.partial(jax.jit, static_argnames=("graphdef", "method", "static"))
def _call(
    graphdef: Any, state: Any, method: Callable[..., Any], static: Any, images: jax.Array, **key: Any
) -> tuple[Any, Any]:
    """Returns method(model, images, ...) and the model's state other than parameters; equal arguments share a trace."""
    model = nnx.merge(graphdef, state)
    return method(model, images, *static, **key), nnx.state(model, nnx.Not(nnx.Param))


def _one_program(method: Method) -> Method:
    """Checks the images, takes a key from `rngs`, and compiles a call once for all models of the same settings.

    Otherwise eager calls and gradients would recompile their scans, because each passes `lax.scan` a new closure.
    """
    is_random = "key" in inspect.signature(method).parameters

    @functools.wraps(method)
    def call(model: Any, images: jax.Array, *static: Any, **others: Any) -> Any:
        if is_random and static:
            raise TypeError(f"{method.__name__} takes only images by position: write key=... or rngs=...")
        model._check_images(images)
        key = {"key": model._training_key(**others)} if is_random else {}
        static = static if is_random else (*static, *others.values())
        graphdef, state = nnx.split(model)
        result, changed = _call(graphdef, state, method, static, images, **key)
        if changed:  # as the counts of Rngs in a head of one's own
            nnx.update(model, changed)
        return result

    return cast(Method, call)


class Block(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): [B, N, D] -> [B, N, D]. Settings as of `VisionTransformer`."""

    def __init__(self, settings: Settings, *, gpsa: bool, rngs: nnx.Rngs) -> None:
        s, dim = settings, settings["embed_dim"]
        common: dict[str, Any] = dict(dtype=jnp.dtype(s["dtype"]), rngs=rngs)
        self.norm1 = layer_norm(dim, **common)
        self.norm2 = layer_norm(dim, **common)
        self.mlp = Mlp(dim, int(dim * s["mlp_ratio"]), drop=s["drop_rate"], **common)
        # Attention comes last, so that the initial MLP does not depend on its kind.
        common |= dict(qkv_bias=s["qkv_bias"], attention=s["attention"])
        common |= dict(attn_drop=s["attn_drop_rate"], proj_drop=s["drop_rate"])
        self.attn: GatedPositionalSelfAttention | SelfAttention
        if gpsa:
            common |= {name: s[name] for name in ("conv_init", "locality_strength", "gate_init")}
            self.attn = GatedPositionalSelfAttention(dim, s["num_heads"], patch_grid(s), **common)
        else:
            self.attn = SelfAttention(dim, s["num_heads"], **common)

    def __call__(
        self, x: jax.Array, *, queries: int | None = None, drop_path_rate: jax.Array | None = None, key: Key = None
    ) -> jax.Array:
        """Returns [B, N, D] of tokens x [B, N, D]; with `queries` (not with GPSA) only of that many leading tokens."""
        attn_key, path1_key, mlp_key, path2_key = split_key(key, 4)
        first: dict[str, Any] = {} if queries is None else {"queries": queries}
        x = x[:, :queries] + drop_path(self.attn(self.norm1(x), key=attn_key, **first), drop_path_rate, path1_key)
        x = checkpoint_name(x, "middle")
        return x + drop_path(self.mlp(self.norm2(x), key=mlp_key), drop_path_rate, path2_key)


class VisionTransformer(nnx.Module):
    """ConViT or DeiT: images float32 [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Outside of `jax.jit` a call is one compiled program, which all models with the same settings share.

    Dropout and stochastic depth act in a call with `key=`, and after `model.train()` in a call with `rngs=`. A new
    model is in evaluation mode; `model.eval()` returns to it.

    Args:
      settings: all of
        image_size: (H, W) in pixels; patch_size: side of a patch, divides both.
        in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio: the usual sizes; num_classes 0: no head.
        qkv_bias: whether queries, keys and values have biases (DeiT).
        local_up_to_layer: number of GPSA blocks before the class token joins, 0 to depth - 1.
        pos_embed_class_token: whether class and distillation token have a position embedding (DeiT).
        distilled: whether there is a distillation token with its head; logits are the mean of both heads.
        conv_init, locality_strength, gate_init: see `GatedPositionalSelfAttention`.
        drop_rate, attn_drop_rate: dropout rates of tokens and of attention maps.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0 at the first.
        attention: "xla", or "cudnn" for its fused kernel (bfloat16, NVIDIA GPUs; see `kernels.py`).
        dtype: "float32" or "bfloat16", of the arithmetic and of the tokens between blocks. Parameters and
          their gradients, softmax, gates, norm statistics, the last norm and the logits are float32.
        remat: recompute whole blocks in the backward pass, to save memory.
        scan_unroll: number of blocks that the scan lays out in a row; depth unrolls it.
      rngs: source of keys for the initial parameters.
    """

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs) -> None:
        s, dim = settings, settings["embed_dim"]
        self.image_size, self.in_chans, self.grid = s["image_size"], s["in_chans"], patch_grid(s)
        self.depth, self.local_up_to_layer, self.embed_dim = s["depth"], s["local_up_to_layer"], dim
        self.drop_rate, self.drop_path_rate = s["drop_rate"], s["drop_path_rate"]
        self.attn_drop_rate, self.deterministic = s["attn_drop_rate"], True
        self.remat, self.scan_unroll = s["remat"], s["scan_unroll"]
        self.preprocess: Callable[[Any], jax.Array] | None = None  # set by load_pretrained, as the next
        self.class_names: tuple[str, ...] | None = None
        self.distilled, self.dtype = s["distilled"], jnp.dtype(s["dtype"])

        def token(count: int) -> nnx.Param:
            return nnx.Param(trunc_normal(rngs.params(), (1, count, dim)))

        block_key = rngs.params()  # the order of the keys decides the weights of a seed
        self.patch_embed = PatchEmbed(s["patch_size"], self.in_chans, dim, dtype=self.dtype, rngs=rngs)
        extra_tokens = (2 if self.distilled else 1) if s["pos_embed_class_token"] else 0
        self.pos_embed = token(self.grid[0] * self.grid[1] + extra_tokens)
        self.cls_token = token(1)
        local, plain = range(self.local_up_to_layer), range(self.local_up_to_layer, self.depth)
        self.gpsa_blocks = _stack(s, local, block_key, gpsa=True) if local else None
        self.sa_blocks = _stack(s, plain, block_key, gpsa=False)
        self.norm = layer_norm(dim, dtype=jnp.float32, rngs=rngs)
        self.head = self._new_head(s["num_classes"], rngs)
        if self.distilled:
            self.dist_token = token(1)
            self.head_dist = self._new_head(s["num_classes"], rngs)

    @_one_program
    def __call__(self, images: jax.Array, *, key: Key = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns logits, float32 [B, num_classes]; of a model without a head the features [B, D].

        Args:
          images: float [B, H, W, C], normalised.
          key: PRNG key of dropout and stochastic depth; with a key the call is one of training in either mode.
          rngs: gives the key in training mode, from its stream `dropout`; unused in evaluation mode.

        Raises:
          ValueError: images of another size, or not of floats; a drop rate above 0 in training mode without
            key and rngs.
        """
        if self.distilled:
            class_logits, distillation_logits = self.both_logits(images, key=key)
            return (class_logits + distillation_logits) / 2
        features = self.features(images, key=key)
        return self.head(features) if self.head is not None else features

    @_one_program
    def both_logits(
        self, images: jax.Array, *, key: Key = None, rngs: nnx.Rngs | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of class and distillation token, float32 [B, num_classes] each.

        In training the first learn the labels and the second the teacher. Arguments as for a call.
        """
        tokens = self._final_tokens(images, key, 2)
        class_token, distillation_token = tokens[:, 0], tokens[:, 1]
        if self.head is None or self.head_dist is None:
            return class_token, distillation_token
        return self.head(class_token), self.head_dist(distillation_token)

    @_one_program
    def features(self, images: jax.Array, *, key: Key = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns the class token after the last norm, float32 [B, D]. Arguments as for a call.

        timm's features of a distilled DeiT are the mean of class and distillation token instead.
        """
        return self._final_tokens(images, key, 2 if self.distilled else 1)[:, 0]

    @_one_program
    def forward_features(self, images: jax.Array, *, key: Key = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns all tokens after the last norm, float32 [B, 1 + N, D], as timm's function of this name.

        Token 0 is the class token and, if distilled, token 1 the distillation token; the N patches follow, row by
        row. Arguments as for a call.
        """
        return self._final_tokens(images, key, None)

    def forward_intermediates(
        self, images: jax.Array, indices: int | Sequence[int] | None = None, *, norm: bool = False
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Returns `forward_features(images)` and the patches after some blocks, as timm's function of this name.

        Args:
          images: as for a call.
          indices: of the blocks, negative ones from the end; an int for the last blocks, None for all.
          norm: whether the last norm is applied to the patches.

        Returns:
          (tokens float32 [B, 1 + N, D], a list of [B, rows, columns, D] in the order of the blocks).

        Raises:
          ValueError: there is no such block.
        """
        depth = self.depth
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise ValueError(f"there are {depth} blocks: give 1 to {depth}, or a list, not {indices}.")
            indices = range(-indices, 0)
        wanted = range(depth) if indices is None else indices
        if missing := [index for index in wanted if not -depth <= index < depth]:
            raise ValueError(f"there is no block {missing[0]}: give 0 to {depth - 1}, or -1 to {-depth}.")
        numbers = sorted({index % depth for index in wanted})
        outputs = [x for stack in self._map_blocks(images, Block.__call__) for x in stack]
        patches = self.grid[0] * self.grid[1]
        found = [outputs[number][:, -patches:] for number in numbers]
        found = [self.norm(x) if norm else x for x in found]
        return self.norm(outputs[-1]), [x.reshape(len(x), *self.grid, self.embed_dim) for x in found]

    @property
    def num_classes(self) -> int:
        """Number of classes of the head, 0 without a head."""
        return self.head.kernel.shape[-1] if self.head else 0

    def reset_classifier(self, num_classes: int, *, seed: int = 0) -> None:
        """Replaces the head (both heads if distilled) by a new one; num_classes 0 removes it."""
        rngs = nnx.Rngs(jax.random.key(seed, impl="threefry2x32"))
        self.head = self._new_head(num_classes, rngs)
        if self.distilled:
            self.head_dist = self._new_head(num_classes, rngs)
        self.class_names = None

    @_one_program
    def attention_maps(self, images: jax.Array) -> list[jax.Array]:
        """Returns the attention of every block, float32 [B, H, N, N]: GPSA of the patches, then of all tokens."""
        stacks = self.map_attention(images, lambda attn, x: attn.attention_maps(x))
        return [maps for stack in stacks for maps in stack]

    @_one_program
    def map_attention(self, images: jax.Array, function: Callable[[Any, jax.Array], Any]) -> list[Any]:
        """Returns function(attn, x) of every attention layer and its input x [B, N, D], stacked as in `stacks`.

        A function is compiled once; what it closes over is fixed then.
        """
        return self._map_blocks(images, lambda block, x: function(block.attn, block.norm1(x)))

    @_one_program
    def _map_blocks(self, images: jax.Array, function: Callable[[Block, jax.Array], Any]) -> list[Any]:
        """function(block, x) of every block and its input x, as for `map_attention`."""
        x, tokens = self._embed(images, None)
        results = []
        for stack in self.stacks:
            if stack is self.sa_blocks:
                x = jnp.concatenate([tokens, x], axis=1)
            graphdef, params = nnx.split(stack)

            def step(x: jax.Array, params: Any, graphdef: Any = graphdef) -> tuple[jax.Array, Any]:
                block = nnx.merge(graphdef, params)
                return block(x), function(block, x)

            x, found = jax.lax.scan(step, x, params)
            results.append(found)
        return results

    @property
    def stacks(self) -> list[Block]:
        """The GPSA blocks, if there are any, and the plain blocks, each kind stacked."""
        return [stack for stack in (self.gpsa_blocks, self.sa_blocks) if stack is not None]

    @property
    def blocks(self) -> list[Block]:
        """The blocks by their number in the original. They are copies: writing to them changes nothing."""
        found = []
        for graphdef, params in map(nnx.split, self.stacks):
            for index in range(len(jax.tree.leaves(params)[0])):
                found.append(nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], params)))
        return found

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a copy made by `nnx.view`, as `train()` and `eval()` do of the model itself."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _new_head(self, num_classes: int, rngs: nnx.Rngs) -> Linear | None:
        head = Linear(self.embed_dim, num_classes, dtype=jnp.float32, rngs=rngs) if num_classes else None
        return nnx.data(head)  # may be replaced by the other kind

    def _training_key(self, key: Key = None, rngs: nnx.Rngs | None = None) -> jax.Array | None:
        """The key of a call with these arguments, None in evaluation."""
        rates = (self.drop_rate, self.attn_drop_rate, self.drop_path_rate)
        if key is not None or self.deterministic or not any(rates):
            return key
        if rngs is None:
            raise ValueError(
                "the model is in training mode and has drop rates, so a call needs randomness: pass "
                "key=jax.random.key(...) or rngs=nnx.Rngs(...), or call model.eval() first"
            )
        return rngs.dropout()

    def _check_images(self, images: Any) -> None:
        expected = (*self.image_size, self.in_chans)
        if not isinstance(images, jax.Array | np.ndarray):
            raise ValueError(
                f"images are a {type(images).__module__}.{type(images).__name__}: pass a JAX or numpy array; of a "
                "torch tensor images.permute(0, 2, 3, 1).numpy()"
            )
        if images.ndim != 4 or images.shape[1:] != expected:
            remedy = "resize them, or create the model with another image_size"
            if images.shape == expected:
                remedy = "it is one image, pass images[None]"
            elif images.ndim == 4 and images.shape[1:] == (self.in_chans, *self.image_size):
                remedy = "they are channels first, pass images.transpose(0, 2, 3, 1)"
            raise ValueError(
                f"images have shape {list(images.shape)}, but this model takes [B, {', '.join(map(str, expected))}] "
                f"(channels last): {remedy}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype}, but this model takes normalised floats: use model.preprocess(images) of "
                "load_pretrained's model, or (images / 255 - mean) / std"
            )

    def _final_tokens(self, images: jax.Array, key: Key, queries: int | None) -> jax.Array:
        """The leading `queries` tokens, or all, after the last norm, float32 [B, ..., D]."""
        embed_key, block_key = split_key(key, 2)
        x, tokens = self._embed(images, embed_key)
        if self.gpsa_blocks is not None:
            x = self._scan(self.gpsa_blocks, 0, x, block_key)
        x = jnp.concatenate([tokens, x], axis=1)
        if self.scan_unroll > 1:
            # Without a loop to fix the layout, XLA for a GPU puts the batch last and transposes the tokens in
            # every block.
            x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))
        return self.norm(self._scan(self.sa_blocks, self.local_up_to_layer, x, block_key, queries))

    def _embed(self, images: jax.Array, key: Key) -> tuple[jax.Array, jax.Array]:
        """Patches [B, N, D] and class (and distillation) token [B, 1 or 2, D], with position embedding."""
        patches_key, tokens_key = split_key(key, 2)
        # Added up in float32, for the gradients of what is added to all images.
        patches = self.patch_embed(images.astype(self.dtype))
        patches = (patches + self.pos_embed[:, -patches.shape[1] :]).astype(self.dtype)
        tokens = self.cls_token[...]
        if self.distilled:
            tokens = jnp.concatenate([tokens, self.dist_token[...]], axis=1)
        is_deit = self.pos_embed.shape[1] > patches.shape[1]
        if is_deit:
            tokens = tokens + self.pos_embed[:, : tokens.shape[1]]
        tokens = jnp.broadcast_to(tokens, (images.shape[0], *tokens.shape[1:])).astype(self.dtype)
        if is_deit:  # the original's ConViT drops values of the patches only
            tokens = dropout(tokens, self.drop_rate, tokens_key)
        return dropout(patches, self.drop_rate, patches_key), tokens

    def _scan(self, stack: Block, first: int, x: jax.Array, key: Key, queries: int | None = None) -> jax.Array:
        """x [B, N, D] through a stack from block number `first` on; with `queries` the last gives [B, queries, D]."""
        graphdef, params = nnx.split(stack)
        count = jax.tree.leaves(params)[0].shape[0]
        numbers = jnp.arange(first, first + count)
        rates = self.drop_path_rate * numbers / max(self.depth - 1, 1) if self.drop_path_rate > 0 else None
        layers = (params, numbers, rates)

        def run(queries: int | None, x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, number, rate = layer
            block_key = None if key is None else jax.random.fold_in(key, number)
            block = nnx.merge(graphdef, params)
            return block(x, queries=queries, drop_path_rate=rate, key=block_key), None

        def checkpointed_block(queries: int | None) -> Callable[..., tuple[jax.Array, None]]:
            # Outside of a loop XLA would share what is recomputed with the forward pass.
            prevent_cse = queries is not None or self.scan_unroll >= count
            policy = None if self.remat else KEEP_PRODUCTS
            return jax.checkpoint(functools.partial(run, queries), prevent_cse=prevent_cse, policy=policy)

        scanned = layers if queries is None else jax.tree.map(lambda leaf: leaf[:-1], layers)
        x, _ = jax.lax.scan(checkpointed_block(None), x, scanned, unroll=min(self.scan_unroll, count))
        if queries is None:
            return x
        return checkpointed_block(queries)(x, jax.tree.map(lambda leaf: leaf[-1], layers))[0]


def _stack(settings: Settings, numbers: range, key: jax.Array, *, gpsa: bool) -> Block:
    """The blocks with these numbers as one Block whose parameters have a leading axis [L]."""
    keys = [jax.random.fold_in(key, number) for number in numbers]
    blocks = [nnx.split(Block(settings, gpsa=gpsa, rngs=nnx.Rngs(params=key))) for key in keys]
    return nnx.merge(blocks[0][0], jax.tree.map(lambda *leaves: stacked(leaves), *(params for _, params in blocks)))


def patch_grid(settings: Settings) -> tuple[int, int]:
    """Returns (rows, columns) of patches of the model's images."""
    height, width = settings["image_size"]
    return height // settings["patch_size"], width // settings["patch_size"]
