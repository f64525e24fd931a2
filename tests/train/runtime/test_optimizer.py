"""Learning rates, averages, accumulated gradients, and the FLOPs counted for a plan."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from neodragon_jax.base.errors import InputError
from support import goldens
from train.runtime import flops
from train.runtime.gradients import value_and_grad
from train.runtime.optimizer import EmaConfig, OptimizerConfig, init_ema, learning_rate, make_optimizer, update_ema
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh, replicated

# --- Rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'rates'),
    [
        ({}, {0: 1.0, 1000: 1.0}),
        ({'warmup_steps': 4}, {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 1000: 1.0}),
        ({'schedule': 'linear', 'decay_steps': 10}, {0: 1.0, 5: 0.5, 10: 0.0, 1000: 0.0}),
        ({'schedule': 'cosine', 'decay_steps': 12}, {0: 1.0, 3: (1 + 0.5**0.5) / 2, 6: 0.5, 12: 0.0, 1000: 0.0}),
        (
            {'schedule': 'cosine', 'warmup_steps': 2, 'decay_steps': 10, 'final_fraction': 0.1},
            {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1, 1000: 0.1},
        ),
        (
            {'schedule': 'linear', 'warmup_steps': 2, 'decay_steps': 6, 'final_fraction': 0.5},
            {1: 0.5, 2: 1.0, 4: 0.75, 6: 0.5, 9: 0.5},
        ),
    ],
)
def test_rate_warms_up_and_falls(settings, rates):
    schedule = learning_rate(OptimizerConfig(learning_rate=2e-3, **settings))
    for update, rate in rates.items():
        assert float(schedule(update)) == pytest.approx(2e-3 * rate, abs=1e-9), update


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'schedule': 'cosin'}, "schedule is 'cosin'; use one of constant, cosine, linear"),
        ({'schedule': 'cosine'}, 'decay_steps is 0'),
        ({'schedule': 'linear', 'warmup_steps': 9, 'decay_steps': 9}, 'decay_steps is 9'),
        ({'decay_steps': 9}, 'decay_steps is 9, but schedule is constant'),
        ({'schedule': 'linear', 'decay_steps': 9, 'final_fraction': 2.0}, 'final_fraction is 2'),
        ({'warmup_steps': -1}, 'warmup_steps is -1'),
        ({'kind': 'mouon'}, "kind is 'mouon'; use one of adamw, muon"),
    ],
)
def test_rates_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**settings)


def test_optimizer_follows_the_rate_clips_and_leaves_fixed_tables_alone():
    config = OptimizerConfig(1e-2, weight_decay=0.0, schedule='linear', decay_steps=4, clip_norm=1.0)
    params = {'positions': jnp.ones(3), 'head': {'kernel': jnp.ones(3)}}
    tx: Any = make_optimizer(config)
    state, moves = tx.init(params), []
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 3 + 2  # moments of the kernel, two counts
    for _ in range(5):
        # Adam's first updates of a constant gradient are the rate, whatever the gradient's size.
        changes, state = tx.update(jax.tree.map(lambda leaf: 100 * leaf, params), state, params)
        assert not changes['positions'].any()
        moves.append(float(changes['head']['kernel'][0]))
    np.testing.assert_allclose(moves, [-1e-2, -7.5e-3, -5e-3, -2.5e-3, 0], rtol=1e-5)
    everything: Any = make_optimizer(config, fixed=())
    assert everything.update(params, everything.init(params), params)[0]['positions'].all()


# --- Averages ---------------------------------------------------------------------------------------------------------


def one_update(kind: str, params: Any, grads: Any) -> Any:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, clip_norm=1e9, kind=kind)
    tx = make_optimizer(config)
    return tx.update(grads, tx.init(params), params)[0]


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    key = jax.random.key(0)
    params = {
        'positions': jnp.ones((3, 4)),
        'embed': {'kernel': jnp.ones((8, 6)), 'bias': jnp.ones(6)},
        'blocks': {'dense': {'kernel': jnp.ones((2, 5, 7))}, 'norm': {'scale': jnp.ones((2, 5))}},
    }
    grads = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)
    got, nesterov = one_update('muon', params, grads), optax.adamw(0.1, 0.9, 0.95, weight_decay=0.0, nesterov=True)
    adam, _ = nesterov.update(grads, nesterov.init(params), params)
    for path in (('embed', 'bias'), ('blocks', 'norm', 'scale')):
        pick = lambda tree, path=path: functools.reduce(lambda part, name: part[name], path, tree)
        assert np.allclose(pick(got), pick(adam), rtol=1e-6), path
    assert not np.any(got['positions'])
    stacked = got['blocks']['dense']['kernel']
    for matrix, gradient in (
        (got['embed']['kernel'], grads['embed']['kernel']),
        *zip(stacked, grads['blocks']['dense']['kernel'], strict=True),
    ):
        values = np.linalg.svd(matrix, compute_uv=False)
        # Five Newton-Schulz steps bring them near to one another, not to one value.
        assert values.max() < 2 * values.min() and np.linalg.svd(gradient, compute_uv=False)[[0, -1]] @ [1, -2] > 0
        assert np.sum(matrix * gradient) < 0
        assert 0.5 * 0.02 < np.sqrt(np.square(matrix).mean()) < 1.5 * 0.02  # rate times MUON_RMS
    alone = {'embed': {'kernel': params['blocks']['dense']['kernel'][1]}}
    (want,) = jax.tree.leaves(one_update('muon', alone, {'embed': {'kernel': grads['blocks']['dense']['kernel'][1]}}))
    assert np.allclose(stacked[1], want, atol=1e-5)


def test_average_follows_its_formula():
    config, params = EmaConfig(decay=0.5), {'a': jnp.arange(3.0), 'positions': jnp.full(3, 0.1)}
    ema, want = init_ema(params), np.arange(3.0)
    assert ema.params['a'].unsafe_buffer_pointer() != params['a'].unsafe_buffer_pointer()
    update = jax.jit(functools.partial(update_ema, config=config))
    for n in range(20):
        params = params | {'a': params['a'] + 1}
        decay = min(0.5, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * np.asarray(params['a'], np.float64)
        ema = update(ema, params)
    assert goldens.relative_error(ema.params['a'], want) < 1e-6
    # Bit for bit, after any number of updates.
    np.testing.assert_array_equal(ema.params['positions'], params['positions'])
    assert int(ema.updates) == 20
    plain = update_ema(init_ema({'a': jnp.zeros(2)}), {'a': jnp.ones(2)}, EmaConfig(decay=0.75, warmup=False))
    np.testing.assert_allclose(plain.params['a'], 0.25)
    with pytest.raises(InputError, match='decay is 1'):
        EmaConfig(decay=1.0)


# --- Gradients in parts -----------------------------------------------------------------------------------------------


def loss_of(params, batch, key):
    del key
    hidden = jnp.tanh(batch['x'] @ params['w'])
    loss = jnp.square(hidden - batch['y']).mean()
    return loss, {'mean': hidden.mean(), 'rows': jnp.float32(len(hidden))}


@pytest.fixture(scope='module')
def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {'w': draw(6, 4)}, {'x': draw(24, 6), 'y': draw(24, 4)}


@pytest.mark.parametrize('parts', [1, 2, 3, 12])
def test_gradient_in_parts_is_the_gradient_of_the_batch(problem, parts):
    params, batch = problem
    key = jax.random.key(0)
    (want_loss, want_aux), want = jax.value_and_grad(loss_of, has_aux=True)(params, batch, key)
    (loss, aux), gradient = jax.jit(functools.partial(value_and_grad, loss_of, parts=parts))(params, batch, key)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    assert goldens.relative_error(gradient['w'], want['w']) < 1e-6
    assert float(aux['mean']) == pytest.approx(float(want_aux['mean']), rel=1e-4, abs=1e-7)
    assert float(aux['rows']) == 24 / parts  # a part saw its own rows only
    assert gradient['w'].dtype == jnp.float32


def test_parts_of_bfloat16_are_added_in_float32():
    """The mean of equal parts equals each part; a sum of 24 parts in bfloat16 would lose some of the 8 bits."""
    params, batch = {'w': jnp.ones((6, 4), jnp.bfloat16)}, {'x': jnp.full((24, 6), 0.7, jnp.bfloat16)}
    linear = lambda params, batch, key: ((batch['x'] @ params['w']).mean(), {})
    (_, _), one = value_and_grad(linear, params, {'x': batch['x'][:1]}, jax.random.key(0))
    (_, _), mean = value_and_grad(linear, params, batch, jax.random.key(0), parts=24)
    assert mean['w'].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean['w'], one['w'])
    total = functools.reduce(jnp.add, [one['w']] * 24)
    assert (total / 24 != one['w']).any()


def test_parts_have_keys_of_their_own(problem):
    params, batch = problem
    noisy = lambda params, batch, key: (jax.random.normal(key), {'noise': jax.random.normal(key)})
    values = {float(value_and_grad(noisy, params, batch, jax.random.key(1), parts)[0][0]) for parts in (1, 2, 3)}
    assert len(values) == 3


def test_what_is_no_number_in_one_part_stays_none(problem):
    params, batch = problem
    broken = batch | {'x': batch['x'].at[5].set(jnp.nan)}
    (loss, _), gradient = value_and_grad(loss_of, params, broken, jax.random.key(0), parts=4)
    assert jnp.isnan(loss) and jnp.isnan(gradient['w']).all()
    with pytest.raises(InputError, match=r'5 parts of a batch of \[24\] rows'):
        value_and_grad(loss_of, params, batch, jax.random.key(0), parts=5)


def test_parts_leave_rows_on_their_devices(problem):
    """Parts of consecutive rows would be gathered first, and each would then occupy only a few devices."""
    params, batch = problem
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    place = jax.tree.map(lambda _: replicated(mesh), params), jax.tree.map(lambda _: batch_sharding(mesh), batch)

    def step(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return value_and_grad(loss_of, params, batch, jax.random.key(0), parts=3)

    compiled = jax.jit(step, in_shardings=place).lower(params, batch).compile()
    text = str(compiled.as_text())
    assert 'all-reduce' in text
    assert not any(name in text for name in ('all-gather', 'all-to-all', 'collective-permute'))
    got = compiled(*jax.device_put((params, batch), place))
    want = value_and_grad(loss_of, params, batch, jax.random.key(0))
    assert goldens.relative_error(got[1]['w'], want[1]['w']) < 1e-6


# --- Arithmetic -------------------------------------------------------------------------------------------------------

X, W = jnp.ones((8, 16)), jnp.ones((16, 16))
PRODUCT = 2 * 8 * 16 * 16


def counted(function, *arguments) -> flops.Flops:
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


def xla_count(function, *arguments) -> float:
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return analysis['flops']


def layers(w, x, rounds, remat):
    layer = lambda x: jnp.tanh(x @ w)
    body = jax.checkpoint(layer) if remat else layer
    return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=rounds)[0].sum()


def test_products_are_counted():
    assert counted(jnp.matmul, X, W).total == PRODUCT
    batched = jnp.ones((3, 5, 4)), jnp.ones((3, 4, 7))
    assert counted(lambda a, b: jnp.einsum('nij,njk->nik', a, b), *batched).total == 2 * 3 * 5 * 4 * 7
    # The gradient of a product takes two products; XLA's own count of the same function agrees without loops.
    square = jax.grad(lambda w, x: jnp.square(x @ w).sum(), argnums=(0, 1))
    assert counted(square, W, X).total == 3 * PRODUCT
    assert xla_count(jnp.matmul, X, W) == pytest.approx(PRODUCT, rel=0.01)


def test_loops_count_as_often_as_they_run():
    forward = functools.partial(layers, rounds=7, remat=False)
    assert counted(forward, W, X).total == 7 * PRODUCT
    assert counted(jax.grad(forward), W, X).total == 3 * 7 * PRODUCT
    # XLA's own analysis, which the plan does not use, counts the body once.
    assert xla_count(forward, W, X) < 2 * PRODUCT
    again = functools.partial(layers, rounds=7, remat=True)
    assert counted(jax.grad(again), W, X).total == 4 * 7 * PRODUCT


def test_branches_and_open_loops():
    branch = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)
    assert counted(branch, X, W) == flops.Flops(2 * PRODUCT)
    until = lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)
    assert counted(until, X, W) == flops.Flops(PRODUCT, open_loops=1)


def test_work_inside_a_shard_map_is_that_of_all_devices():
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    specs = {'in_specs': (PartitionSpec('a'), PartitionSpec()), 'out_specs': PartitionSpec('a')}
    split = jax.shard_map(jnp.matmul, mesh=mesh, axis_names={'a'}, **specs)
    assert counted(split, X, W).total == PRODUCT


def test_convolutions_are_counted():
    kernel, image = jnp.ones((3, 3, 4, 6)), jnp.ones((2, 8, 8, 4))
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    convolve = lambda k, x: jax.lax.conv_general_dilated(x, k, (2, 2), 'SAME', dimension_numbers=dimensions)
    once = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert counted(convolve, kernel, image).total == once
    gradient = jax.grad(lambda k, x: convolve(k, x).sum(), argnums=(0, 1))
    assert counted(gradient, kernel, image).total == 3 * once
    grouped = lambda k, x: jax.lax.conv_general_dilated(
        x, k, (1, 1), 'SAME', dimension_numbers=dimensions, feature_group_count=4
    )
    assert counted(grouped, jnp.ones((3, 3, 1, 4)), image).total == 2 * (2 * 8 * 8 * 4) * 9


def test_optimizer_is_still_a_gradient_transformation():
    assert isinstance(make_optimizer(OptimizerConfig()), optax.GradientTransformation)
