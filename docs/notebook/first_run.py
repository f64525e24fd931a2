# %% [markdown]
# # Neodragon in JAX: a first run on one machine
#
# Generate a video, sample the teacher, distill a few-step student, resume the training, and generate with the new
# student. Every step runs in this process, because a TPU belongs to one process at a time. The notebook runs on a TPU
# VM with a single host (such as v5litepod-1, -4 or -8), on the TPU of Colab, on a GPU, or on a CPU.
#
# Two presets:
#
# | `PRESET` | model | result |
# |---|---|---|
# | `shapes` | the trained checkpoint in the package, 10 MB, for videos of one moving shape | a student of its teacher |
# | `tiny` | a miniature with random weights | a rehearsal; its videos show nothing |
#
# This notebook is made from `docs/notebook/first_run.py`, which a test runs with `tiny` on a CPU.

# %% [markdown]
# ## Install
#
# On a new machine, remove the comment signs and run the cell once; then restart the kernel. Use the extra `tpu` on a
# TPU only. Without this cell, start Jupyter in the folder of the checkout.

# %%
# !git clone REPOSITORY neodragon
# %cd neodragon
# !pip install --quiet -e ".[train,tpu]"

# %%
import json
import os
import pathlib

import jax

import neodragon_jax as nd
from configs import dmd
from train import teacher_samples
from train.dmd.program import RECIPE

PRESET = os.environ.get('PRESET', 'shapes')
OUT = pathlib.Path(os.environ.get('OUT', 'out/notebook')) / PRESET
PROMPTS = [
    'a small red circle moves right on a blue background',
    'a small green square moves left on a black background',
]
SIZE = {'frames': 17, 'height': 64, 'width': 64}
OUT.mkdir(parents=True, exist_ok=True)
jax.devices()

# %% [markdown]
# ## Generate
#
# The student of the package calls its denoiser six times for the first latent frame and three times for each later one.
# The first call of a size compiles. A video depends on prompt, seed and number only.

# %%
system = nd.load('moving_shapes')
video = system.generate(PROMPTS[0], seed=0)
video

# %% [markdown]
# ## Sample the teacher
#
# The training data of the distillation are videos that the multi-step denoiser samples, stored as latents. The same
# cell continues an interrupted set. The first frame comes from where the student's videos have it: with `shapes` the
# denoiser samples it, with `tiny` the first-frame model of the checkpoint draws it.

# %%
CHECKPOINT = {'shapes': 'neodragon_jax/assets/moving_shapes', 'tiny': 'tests/goldens/tiny_checkpoint'}[PRESET]
(OUT / 'prompts.txt').write_text('\n'.join(PROMPTS) + '\n')
arguments = [word for name, value in SIZE.items() for word in (f'--{name}', str(value))]
arguments += ['--checkpoint', CHECKPOINT, '--prompts-file', str(OUT / 'prompts.txt'), '--out', str(OUT / 'samples')]
if PRESET == 'tiny':
    arguments += ['--count', '8', '--steps', '2', '2', '2', '--dtype', 'float32']
else:
    arguments += ['--count', '64', '--batch', '4']
assert teacher_samples.main(arguments) == 0

# %% [markdown]
# ## Distill
#
# `configs/dmd.py` has every setting and its default. The mesh of both presets splits the batch over all devices.

# %%
STEPS = {'shapes': 30, 'tiny': 1}[PRESET]
settings = dmd.get_config(PRESET)
settings.update(checkpoint=CHECKPOINT, data=str(OUT / 'samples'), workdir=str(OUT / 'dmd'), seed=39)
settings.loop.update(steps=STEPS, log_every=STEPS)
RECIPE.run(settings)

# %% [markdown]
# ## Resume
#
# A run whose last step is already stored continues from there. A killed run continues in the same way, and its result
# equals that of an uninterrupted run bit for bit.

# %%
settings.loop.steps = 2 * STEPS
RECIPE.run(settings)
[json.loads(line) for line in (OUT / 'dmd' / 'metrics.jsonl').read_text().splitlines()]

# %% [markdown]
# ## Generate with the new student

# %%
student = nd.load(CHECKPOINT, student=OUT / 'dmd' / 'result')
new_video = student.generate(PROMPTS[0], **SIZE)
new_video.save(OUT / 'new_student.mp4')
new_video

# %% [markdown]
# ## The released model
#
# For the released weights, `CHECKPOINT` is their folder or hub name, and the settings are `dmd.get_config('full')`.
# Student, fake score and their moments need 16 chips of 16 GB: see `docs/first_hour.md`, and the table of slices in
# `docs/tpu_sizing.md`.
