"""Sharded training programs, run from a checkout: `python -m train.dmd --config=configs/dmd.py`.

What one runs is here: the objectives (teacher, text, autoencoder, decoder, prune and pruning, dmd, super_resolution),
the programs that write data (captioned_clips, moving_shapes, latents, prompts, text_states, teacher_samples), `launch`,
`loader_benchmark` and `packing`; and what they all share: `loop`, `sharding`, `losses`. Their parts are in folders.
`python -m train.aot` sizes a program on a TPU slice, `python -m train.benchmark` trains the whole chain on toy videos.
"""
