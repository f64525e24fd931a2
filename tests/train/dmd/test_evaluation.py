"""The evaluation of a student in the run, on a denoiser in closed form and a decoder that scales latents."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base import video
from neodragon_jax.base.errors import InputError
from support.point_world import CHANNELS, FRAMES, GRID, make_batch, point, point_program
from train.dmd.evaluation import EvaluationConfig, StudentEvaluation, band_metrics, compared
from train.runtime.program import DivergedError

VIDEOS = 2


def decode(latents):
    """Return three channels of every latent frame, eight times enlarged, each frame eight times but the first."""
    pictures = np.clip(128 + 40 * latents[0, ..., :3], 0, 255).astype(np.uint8)
    pictures = pictures.repeat(8, axis=1).repeat(8, axis=2)
    return np.concatenate([pictures[:1], pictures[1:].repeat(8, axis=0)])


def evaluation(program, held_out, **options) -> StudentEvaluation:
    config = EvaluationConfig(videos=VIDEOS, **options)
    parts = (program.own_histories.rollout, program.examples.first_unit, program.updates, program.negative)
    return StudentEvaluation(config, *parts, held_out, decode)


def held_out() -> dict[str, np.ndarray]:
    return {name: np.asarray(array)[:VIDEOS] for name, array in make_batch().items()}


def test_a_student_like_its_teacher_has_ratios_of_one(tmp_path):
    program, rows = point_program(), held_out()
    rows['latents'] = evaluation(program, rows).sample(point(1))
    metrics = evaluation(program, rows)(point(1), point(1), 10, tmp_path / 'samples')
    ratios = ('motion', 'sharpness', 'saturation', 'flicker', 'teacher_error')
    by_unit = {
        name: [f'{name}/unit{unit}' for unit in (1, 2)] for name in (*ratios, 'deviation_own', 'deviation_teacher')
    }
    assert {name for name in metrics if '/' in name} == set(itertools.chain(*by_unit.values()))
    assert all(metrics[name] == pytest.approx(1) for ratio in ratios for name in by_unit[ratio])
    # The units do not depend on their history, so that they are the same with either one.
    assert max(metrics['deviation_own'], metrics['deviation_teacher']) < 1e-6
    assert (metrics['distance'], metrics['outside_band']) == (pytest.approx(0), 0)
    film = video.read_mp4(tmp_path / 'samples' / '000.mp4')
    assert film.shape == (1 + 8 * (FRAMES - 1), 8 * GRID, 2 * 8 * GRID, 3)
    assert (tmp_path / 'samples' / '001.png').exists()


def test_it_generates_behind_its_own_frames_from_the_given_first_one():
    program, rows = point_program(), held_out()
    latents = evaluation(program, rows).sample(point(1))
    assert latents.shape == (VIDEOS, FRAMES, GRID, GRID, CHANNELS)
    np.testing.assert_array_equal(latents[:, 0], rows['latents'][:, 0])
    # One step of the true flow of a point leads to it, moved by the prompt.
    want = np.asarray(point(1)['point'])[0, 0] + rows['pooled'].mean(axis=1).reshape(-1, 1, 1, 1)
    assert np.abs(latents[:, 1] - want).max() < 1e-2
    both = point_program(protocol='21')
    assert np.abs(evaluation(both, rows).sample(point(1))[:, 0] - want).max() < 1e-2


class Drifting:
    """A flow to the frame before, moved by the student's parameter: errors add up from unit to unit."""

    def apply(self, variables, clips, *rest):
        del rest
        return clips[-1] - clips[-2].mean(axis=(2, 3), keepdims=True) - variables['params']['drift']


def test_errors_that_add_up_show_behind_own_history_only(tmp_path):
    program, rows = point_program(), held_out()
    program.module = program.teacher_module = Drifting()  # pyright: ignore[reportAttributeAccessIssue]
    rows['latents'] = evaluation(program, rows).sample({'drift': jnp.float32(0.0)})
    evaluate = evaluation(program, rows)
    metrics = evaluate({'drift': jnp.float32(0.5)}, {'drift': jnp.float32(0.0)}, 1, tmp_path)
    own, forced = ([metrics[f'deviation_{name}/unit{unit}'] for unit in (1, 2)] for name in ('own', 'teacher'))
    assert own[0] == pytest.approx(forced[0])
    assert forced[1] == pytest.approx(forced[0], rel=0.05)
    assert own[1] == pytest.approx(2 * own[0], rel=0.05)


def test_the_teacher_s_error_is_larger_on_what_it_would_not_draw(tmp_path):
    program, rows = point_program(guidance=1.5), held_out()
    rows['latents'] = evaluation(program, rows).sample(point(0))
    like, unlike = (evaluation(program, rows)(point(seed), point(0), 1, tmp_path) for seed in (0, 1))
    assert like['teacher_error'] == pytest.approx(1)
    assert unlike['teacher_error'] > 1.5
    assert min(unlike[f'teacher_error/unit{unit}'] for unit in (1, 2)) > 1.5


def clip(amount: float, speed: int) -> np.ndarray:
    """Return a moving pattern of colored squares on gray."""
    rng = np.random.default_rng(0)
    pattern = rng.uniform(-1, 1, (12, 12, 3)).repeat(8, axis=0).repeat(8, axis=1)
    frames = [np.roll(pattern, speed * number, axis=1)[:64, :64] for number in range(17)]
    return np.clip(128 + amount * np.stack(frames), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ('student', 'name', 'value'),
    [(clip(60, 0), 'motion', 0.1), (clip(20, 2), 'saturation', 0.4), (clip(20, 2), 'sharpness', 0.4)],
)
def test_collapse_and_wash_out_leave_the_band(student, name, value):
    metrics = compared([student], [clip(60, 2)], 1)
    assert metrics[name] < value
    assert band_metrics(metrics, EvaluationConfig())['outside_band'] >= 2
    assert band_metrics(compared([clip(60, 2)], [clip(60, 2)], 1), EvaluationConfig())['outside_band'] == 0


def test_a_generated_first_frame_is_compared_too():
    teacher, gray = clip(60, 2), clip(60, 2)
    gray[0] = gray[0].mean(axis=-1, keepdims=True).astype(np.uint8)
    metrics = compared([gray], [teacher], 0)
    assert metrics['saturation/unit0'] < 0.2 and metrics['sharpness/unit0'] == pytest.approx(1, abs=0.1)
    assert metrics['saturation/unit2'] == 1 and not {'motion/unit0', 'flicker/unit0'} & set(metrics)
    assert band_metrics(metrics, EvaluationConfig())['outside_band'] == 1
    assert 'saturation/unit0' not in compared([gray], [teacher], 1)


def test_videos_of_one_frame_have_finite_metrics(tmp_path):
    program, rows = point_program(protocol='21', length=1), held_out()
    rows['latents'] = rows['latents'][:, :1]
    metrics = evaluation(program, rows)(point(1), point(0), 1, tmp_path)
    assert {'sharpness/unit0', 'saturation/unit0', 'distance'} < metrics.keys() and 'motion' not in metrics
    assert np.isfinite(list(metrics.values())).all()


def test_outside_the_band_it_warns_or_stops(capsys, tmp_path):
    program, rows = point_program(), held_out()
    still = {'point': 0 * point(1)['point']}
    rows['pooled'] = 0 * rows['pooled']
    metrics = evaluation(program, rows)(still, point(1), 10, tmp_path / 'a')
    assert metrics['outside_band'] > 0
    assert 'warning: step 10: student over teacher outside 0.5..2.0: ' in capsys.readouterr().out
    stopping = {'stop': True, 'stop_after': 20}
    evaluation(program, rows, **stopping)(still, point(1), 19, tmp_path / 'b')
    with pytest.raises(DivergedError, match=r'step 20: .*unit2'):
        evaluation(program, rows, **stopping)(still, point(1), 20, tmp_path / 'c')


@pytest.mark.parametrize(
    ('values', 'message'),
    [({'videos': -1}, '^videos is -1'), ({'lowest': 1.5}, 'enclose 1'), ({'highest': 0.9}, 'enclose 1')],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**values)
    assert dataclasses.replace(EvaluationConfig(), videos=3).videos == 3
