"""The XLA flags of training on TPUs: the one place. `python -m train.tpu_flags` prints what a launch script exports:

    export LIBTPU_INIT_ARGS="$(python -m train.tpu_flags)"

`train.aot` compiles with the same flags.
"""

from __future__ import annotations

FLAGS = {
    # Collectives stay whole instead of being cut into steps that alternate with matrix products: at width 1536 the
    # pieces are too small. A forward pass over 16 chips took half the cycles without.
    'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000',
    # Parameters of the next block are gathered while this one computes.
    'xla_enable_async_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
    'xla_tpu_overlap_compute_collective_tc': 'true',
    'xla_tpu_enable_latency_hiding_scheduler': 'true',
    # Of the 128 MiB of a core's vector memory, what one fusion may use.
    'xla_tpu_scoped_vmem_limit_kib': '65536',
}


def main() -> None:
    """Print the flags for LIBTPU_INIT_ARGS."""
    print(' '.join(f'--{name}={value}' for name, value in FLAGS.items()))


if __name__ == '__main__':
    main()
