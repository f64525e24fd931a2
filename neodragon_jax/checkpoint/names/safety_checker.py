"""Rename table of the safety checker."""

from __future__ import annotations

from neodragon_jax.checkpoint.names.convert import CONV2D, SAME, Entry, dense, norm
from neodragon_jax.checkpoint.names.text import clip_layer_names
from neodragon_jax.config.safety_checker import SafetyCheckerConfig


def safety_checker_names(config: SafetyCheckerConfig) -> list[Entry]:
    """Return the entries of StableDiffusionSafetyChecker."""
    tower = 'vision_model.vision_model'
    rows = [
        Entry(f'{tower}.embeddings.class_embedding', ('class_embedding',), SAME),
        Entry(f'{tower}.embeddings.position_embedding.weight', ('position_embedding',), SAME),
        *dense(f'{tower}.embeddings.patch_embedding', ('patch_embed',), bias=False, weight=CONV2D),
        *norm(f'{tower}.pre_layrnorm', ('pre_norm',)),  # misspelled in the release
    ]
    for i in range(config.num_hidden_layers):
        rows += clip_layer_names(f'{tower}.encoder.layers.{i}', (f'layer_{i}',))
    rows += norm(f'{tower}.post_layernorm', ('post_norm',))
    rows += dense('visual_projection', ('projection',), bias=False)
    rows += [
        Entry('concept_embeds', ('concepts',), SAME),
        Entry('concept_embeds_weights', ('concept_thresholds',), SAME),
        Entry('special_care_embeds', ('special_concepts',), SAME),
        Entry('special_care_embeds_weights', ('special_thresholds',), SAME),
    ]
    return rows
