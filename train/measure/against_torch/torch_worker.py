"""PyTorch worker of the comparison: times a straightforward denoiser and distillation step with random weights.

    PYTHON torch_worker.py RESULT < REQUEST

The denoiser is a stack of diffusers' `JointTransformerBlock`, the block of Stable Diffusion 3 from which Neodragon's is
derived, with the same widths, depth and numbers of tokens. It does less than the project's: no attention mask, so that
PyTorch's fused attention kernel applies, no rotary embedding, and no upsampling in the objective. Compute is autocast,
parameters are float32, every block is a gradient checkpoint, the optimizer is the fused AdamW. The script imports
nothing from this project, which is not installed in its environment; see requirements.txt.

Legend: B batch, I image tokens, X tokens of the current unit, L text tokens, D width, P numbers in a patch.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

# The packages are not installed in the environment that runs the type checker.
import diffusers  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from diffusers.models.attention import JointTransformerBlock  # pyright: ignore[reportMissingImports]
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings  # pyright: ignore[reportMissingImports]
from diffusers.models.normalization import AdaLayerNormContinuous  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
GUIDANCE, DECAY, CLIP_NORM = 5.0, 0.99, 1.0


class Denoiser(nn.Module):
    """Patches [B, I, P], text [B, L, D], pooled [B, p] and timestep [B] -> flow [B, X, P]."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        width, layers, patch = case['heads'] * case['head_dim'], case['layers'], case['patch_dim']
        self.embed = nn.Linear(patch, width)
        self.condition = CombinedTimestepTextProjEmbeddings(width, case['pooled'])
        self.blocks = nn.ModuleList(
            JointTransformerBlock(
                width, case['heads'], case['head_dim'], context_pre_only=index == layers - 1, qk_norm='rms_norm'
            )
            for index in range(layers)
        )
        self.norm = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(width, patch)

    def forward(self, patches: Any, text: Any, pooled: Any, timestep: Any, current: int) -> Any:
        """Return the flow of the last `current` tokens."""
        image, condition = self.embed(patches), self.condition(timestep, pooled)
        for block in self.blocks:
            if torch.is_grad_enabled():
                text, image = checkpoint(block, image, text, condition, use_reentrant=False)
            else:
                text, image = block(image, text, condition)
        return self.head(self.norm(image[:, -current:], condition))


class Inputs:
    """A random batch at a stage: a history, the current unit and the prompts."""

    def __init__(self, case: dict[str, Any], stage: int) -> None:
        tokens, self.current = case['tokens'][str(stage)]
        batch, width = case['batch'], case['heads'] * case['head_dim']
        draw = lambda *shape: torch.randn(shape, device=DEVICE)
        self.past, self.clean = (
            draw(batch, count, case['patch_dim']) for count in (tokens - self.current, self.current)
        )
        self.text, self.negative = (draw(batch, case['text_tokens'], width) for _ in range(2))
        self.pooled, self.timestep = draw(batch, case['pooled']), torch.full((batch,), 500.0, device=DEVICE)

    def flow(self, model: Denoiser, x: Any, negative: bool = False) -> Any:
        """Return the flow at x, in float32."""
        text = self.negative if negative else self.text
        return model(torch.cat([self.past, x], 1), text, self.pooled, self.timestep, self.current).float()


class Distillation:
    """Student, fake score and frozen teacher with their optimizers; one call of `step` is an iteration."""

    def __init__(self, case: dict[str, Any], teacher: Denoiser) -> None:
        self.updates, self.teacher = case['fake_updates'], teacher
        self.student, self.fake = (Denoiser(case).to(DEVICE) for _ in range(2))
        self.average = [leaf.detach().clone() for leaf in self.student.parameters()]
        options = {'lr': 1e-6, 'betas': (0.9, 0.95), 'weight_decay': 1e-4, 'fused': True}
        self.optimizers = [torch.optim.AdamW(model.parameters(), **options) for model in (self.student, self.fake)]

    def step(self, inputs: Inputs) -> Any:
        """Update the fake score, then the student; return the student's loss."""
        for _ in range(self.updates):
            with torch.no_grad():
                clean = self._clean(inputs)
            probe, flow = self._probe(clean)
            self._update(1, self.fake, (inputs.flow(self.fake, probe) - flow).square().mean())
        clean = self._clean(inputs)
        with torch.no_grad():
            probe, _ = self._probe(clean)
            negative, positive = (inputs.flow(self.teacher, probe, negative) for negative in (True, False))
            slope = negative + GUIDANCE * (positive - negative) - inputs.flow(self.fake, probe)
        distance = (clean - inputs.clean).square().mean((1, 2))
        loss = (clean * slope).mean() + 0.5 * torch.log1p(distance).mean()
        self._update(0, self.student, loss)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.student.parameters()), 1 - DECAY)
        return loss.detach()

    def _clean(self, inputs: Inputs) -> Any:
        """Return the student's clean prediction."""
        x = torch.randn_like(inputs.clean)
        return x - inputs.flow(self.student, x)

    def _probe(self, clean: Any) -> tuple[Any, Any]:
        """Return the re-noised prediction and the flow of its pair."""
        noise, level = torch.randn_like(clean), torch.rand(len(clean), 1, 1, device=DEVICE)
        return torch.lerp(clean, noise, level), noise - clean

    def _update(self, number: int, model: Denoiser, loss: Any) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        self.optimizers[number].step()
        self.optimizers[number].zero_grad(set_to_none=True)


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the time of a run until its result is computed."""
    start = time.perf_counter()
    result = run()
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if not bool(torch.isfinite(result).all()):
        raise RuntimeError('a result is not finite')
    return seconds


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return the times of a case, as JSON values."""
    torch.manual_seed(0)
    if not CUDA:
        torch.set_num_threads(1)  # a rehearsal; the threads of a busy machine wait for each other
    dtype = getattr(torch, case['dtype'])
    compute = torch.autocast(DEVICE.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    teacher = Denoiser(case).to(DEVICE).requires_grad_(False)
    parameters = sum(leaf.numel() for leaf in teacher.parameters())
    batches = {stage: Inputs(case, stage) for stage in case['stages']}
    seconds: dict[str, list[float]] = {}
    first: dict[str, float] = {}

    def time_runs(name: str, run: Callable[[], Any]) -> None:
        first[name], *seconds[name] = (seconds_of(run) for _ in range(1 + case['repeats']))

    with compute:
        teacher = teacher.to(dtype)  # frozen parameters are held in the compute type
        for stage, inputs in batches.items():
            with torch.no_grad():
                time_runs(f'denoiser/{stage}', lambda inputs=inputs: inputs.flow(teacher, inputs.clean))
        distillation = Distillation(case, teacher)
        for stage, inputs in batches.items():
            time_runs(f'distillation/{stage}', lambda inputs=inputs: distillation.step(inputs))
    return {
        'device': torch.cuda.get_device_name() if CUDA else 'cpu',
        'versions': {'torch': torch.__version__, 'diffusers': diffusers.__version__},
        'parameters': parameters,
        'seconds': seconds,
        'compile_s': first,
        'peak_gb': torch.cuda.max_memory_allocated() / 1e9 if CUDA else None,
    }


if __name__ == '__main__':
    pathlib.Path(sys.argv[1]).write_text(json.dumps(measure(json.loads(sys.stdin.read()))))
