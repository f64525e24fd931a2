"""Colors by their tags (ITU-T H.273): which are close enough to sRGB to be stored as they are, and why others are not.

These are lists of what is right, so that a tag that nobody thought of is refused and not stored with wrong colors.
"""

from __future__ import annotations

# Values of 0 (but for the matrix) and 3 are reserved, and read as unspecified.
UNTAGGED = (0, 2, 3)
BT709 = 1
# BT.709, and the nearly equal ones of BT.601 (PAL, NTSC), SMPTE 240M and EBU 3213.
PRIMARIES = (*UNTAGGED, BT709, 5, 6, 7, 22)
# BT.709, gamma 2.2, BT.601, SMPTE 240M, xvYCC, BT.1361, sRGB and BT.2020 in SDR: a video's usual curves.
TRANSFERS = (*UNTAGGED, BT709, 4, 6, 7, 11, 12, 13, 14, 15)
# BT.709, FCC, BT.601 (PAL, NTSC), SMPTE 240M and BT.2020, which FFmpeg converts to RGB.
MATRICES = (2, 3, BT709, 4, 5, 6, 7, 9)
BT2020 = 9

PRIMARIES_NAMES = {4: 'BT.470 M', 8: 'film', BT2020: 'BT.2020', 10: 'CIE XYZ', 11: 'DCI-P3', 12: 'Display P3'}
HDR = {16: 'PQ', 18: 'HLG'}
TRANSFER_NAMES = {5: 'gamma 2.8', 8: 'linear', 9: 'logarithmic 100:1', 10: 'logarithmic 316:1', 17: 'SMPTE 428'}
MATRIX_NAMES = {
    0: 'RGB', 8: 'YCgCo', 10: 'BT.2020 with constant luminance', 11: 'SMPTE 2085', 12: 'derived from the primaries',
    13: 'derived from the primaries, with constant luminance', 14: 'ICtCp',
}  # fmt: skip


def color_problem(primaries: int, transfer: int, matrix: int | None = None) -> str | None:
    """Return why colors with these tags would be stored wrongly, and the remedy; None if they would not.

    Args:
      matrix: None for RGB.
    """
    if transfer in HDR:
        return f'HDR ({HDR[transfer]}); tone-map it to BT.709 first'
    if matrix == BT2020 and primaries in UNTAGGED:  # players assume the primaries of the matrix
        primaries = BT2020
    if primaries not in PRIMARIES:
        return f'wide colors ({PRIMARIES_NAMES.get(primaries, primaries)}); convert it to BT.709 first'
    if transfer not in TRANSFERS:
        return f'transfer curve {TRANSFER_NAMES.get(transfer, transfer)}; convert it to BT.709 first'
    if matrix is not None and matrix not in MATRICES:
        return f'color matrix {MATRIX_NAMES.get(matrix, matrix)}; convert it to BT.709 first'
    return None
