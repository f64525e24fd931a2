"""Rename tables of the text encoders and the context adapter."""

from __future__ import annotations

from neodragon_jax.checkpoint.names.convert import SAME, Entry, dense, norm
from neodragon_jax.config.neodragon import CLIPTextConfig, ContextAdapterConfig, T5Config, T5EncoderConfig

# Aliases of tied tensors. Files store the tensor under the name on the right; a state dict lists both names.
T5_TIED_NAMES = {
    'encoder.encoder.embed_tokens.weight': 'encoder.shared.weight',  # DT5
    'encoder.embed_tokens.weight': 'shared.weight',  # a bare T5 encoder
}


def t5_encoder_names(config: T5EncoderConfig, prefix: str = '', path: tuple[str, ...] = ()) -> list[Entry]:
    """Return the entries of a bare T5 encoder under a released prefix and a Flax path."""

    def embedding(name: str, *at: str) -> Entry:
        return Entry(f'{prefix}{name}.weight', (*path, *at, 'embedding'), SAME)

    rows = [embedding('shared', 'token_embedding')]
    # The table shared by all layers is stored with the first layer.
    first = 'encoder.block.0.layer.0.SelfAttention'
    rows += [embedding(f'{first}.relative_attention_bias', 'position_bias', 'table')]
    for i in range(config.num_layers):
        block, at = f'{prefix}encoder.block.{i}', (*path, f'block_{i}')
        for letter, name in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('o', 'out')):
            rows += dense(f'{block}.layer.0.SelfAttention.{letter}', (*at, 'attention', name), bias=False)
        for theirs, ours in (('wi_0', 'mlp_gate'), ('wi_1', 'mlp_value'), ('wo', 'mlp_out')):
            rows += dense(f'{block}.layer.1.DenseReluDense.{theirs}', (*at, ours), bias=False)
        rows += norm(f'{block}.layer.0.layer_norm', (*at, 'attention_norm'), bias=False)
        rows += norm(f'{block}.layer.1.layer_norm', (*at, 'mlp_norm'), bias=False)
    return rows + norm(f'{prefix}encoder.final_layer_norm', (*path, 'final_norm'), bias=False)


def t5_names(config: T5Config) -> list[Entry]:
    """Return the entries of T5EncoderWithProjection (`text_encoder_3`)."""
    rows = t5_encoder_names(config, 'encoder.', ('encoder',))
    # 1 and 2 are the activation and the dropout in between.
    rows += dense('final_projection.0', ('projection_in',), bias=False)
    return rows + dense('final_projection.3', ('projection_out',), bias=False)


def context_adapter_names(config: ContextAdapterConfig) -> list[Entry]:
    """Return the entries of ContextAdapter."""
    last = len(config.layer_depths)
    rows = []
    for i in range(last + 1):
        # Hidden layers are stored as (something without weights, linear), the last as (linear, activation).
        rows += dense(f'network_layers.{i}.{0 if i == last else 1}', (f'layer_{i}',), bias=config.use_biases)
    return rows


def clip_layer_names(layer: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the entries of one layer of a CLIP tower, of text or pictures."""
    rows = []
    for theirs, ours in (('q_proj', 'query'), ('k_proj', 'key'), ('v_proj', 'value'), ('out_proj', 'out')):
        rows += dense(f'{layer}.self_attn.{theirs}', (*path, 'attention', ours))
    rows += dense(f'{layer}.mlp.fc1', (*path, 'mlp_in')) + dense(f'{layer}.mlp.fc2', (*path, 'mlp_out'))
    rows += norm(f'{layer}.layer_norm1', (*path, 'attention_norm'))
    return rows + norm(f'{layer}.layer_norm2', (*path, 'mlp_norm'))


def clip_names(config: CLIPTextConfig, projection: bool) -> list[Entry]:
    """Return the entries of CLIPTextModel, with or without the projection of the pooled state."""
    embeddings = 'text_model.embeddings'
    rows = [
        Entry(f'{embeddings}.{name}.weight', (name, 'embedding'), SAME)
        for name in ('token_embedding', 'position_embedding')
    ]
    for i in range(config.num_hidden_layers):
        rows += clip_layer_names(f'text_model.encoder.layers.{i}', (f'layer_{i}',))
    rows += norm('text_model.final_layer_norm', ('final_norm',))
    return rows + dense('text_projection', ('projection',), bias=False) * projection
