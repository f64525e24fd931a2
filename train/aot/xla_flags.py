"""XLA flags for training on TPUs, used by `train.tpu_flags` for TPU hosts and by `train.aot` for its compilations."""

from __future__ import annotations

FLAGS = {
    # Keep collectives whole instead of splitting them into steps that alternate with matrix products: at width 1536 the
    # pieces are too small. Without the split, a forward pass over 16 chips took half the cycles.
    'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000',
    # Gather the parameters of the next block while the current one computes.
    'xla_enable_async_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
    'xla_tpu_overlap_compute_collective_tc': 'true',
    'xla_tpu_enable_latency_hiding_scheduler': 'true',
    # Vector memory that one fusion may use, of the 128 MiB of a core.
    'xla_tpu_scoped_vmem_limit_kib': '65536',
}
