"""Rows of an export's report."""

from __future__ import annotations

from export.report.rows import Row


def make_row(htp_db: float | None, precision: str = 'w8a16', lowest_db: float = 40.0) -> Row:
    """Return a row of stage 0, whose target is 29 dB, with three evaluation prompts."""
    return Row(
        graph='denoiser_stage0',
        precision=precision,
        chipset='sm8750',
        ships=precision == 'w8a16',
        operations=142,
        target_db=29.0,
        onnx_db=130.0,
        prompts_db={'a': lowest_db, 'b': lowest_db + 2, 'c': lowest_db + 3},
        htp_db=htp_db,
        doubled_weights=0,
        ranges_db={'minmax': 40.0, 'mse': 39.0},
        rounding_db={'nearest': 33.0, 'adaround': 39.0},
        qnn_operations=170,
        moved_mb=1.0,
        transposes=4,
        transposed_mb=0.1,
        float_operations=0,
        binary_mb=0.4,
        shared=True,
        estimated_ms={'ms': 0.15, 'low_ms': 0.09, 'high_ms': 0.25, 'flat_ms': 0.105, 'by_operation_ms': 0.09},
        resources={
            'float graph': {'seconds': 1.0, 'peak_gb': None},
            'quantize': {'seconds': 2.0, 'peak_gb': 0.5},
            'compile': {'seconds': 0.5, 'peak_gb': 0.2},
            'simulate': None,
        },
        paper_ms={'X Elite': 54.9, '8 Elite': None},
    )
