"""Reading a set of captioned clips, stored as H.264 or as plain arrays."""

from __future__ import annotations

from typing import Any

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from train.data import mp4_bytes
from train.data.record_spec import ArraySpec, RecordSpec
from train.data.sample_source import SampleSource

# A record of train.captioned_clips: `start` is the clip's first second in its file.
CLIP_SPEC = RecordSpec({'start': ArraySpec((), 'float32')}, texts=('prompt', 'file'), blobs=('video',))


class ClipSource:
    """Dataset of clips: a `Source` of {'video': uint8 [T, H, W, 3], 'prompt', 'index'} and the dataset's other fields.

    Clips are stored as train.captioned_clips stores them, or as plain arrays.

    Attributes:
      protocol: the settings that all clips share: frames, height, width, and how they were made.
      texts: names of the texts of a sample.
    """

    def __init__(self, folder: PathLike, *, verify: bool = False) -> None:
        """Open a dataset of one size; see `SampleSource`.

        Raises:
          InputError: it cannot be read, or holds something else.
        """
        self._folder, self._records = folder, SampleSource(folder, verify=verify)
        spec = self._records.spec
        self.protocol, self.texts, self._encoded = self._records.protocol, spec.texts, 'video' in spec.blobs
        if not self._encoded and 'video' not in spec.arrays:
            raise InputError(
                f'{folder}: holds {", ".join(spec.names())}, no video; pass a folder of train.captioned_clips.'
            )

    def __len__(self) -> int:
        return len(self._records)

    @property
    def identity(self) -> str:
        """Hash of the content of all clips, see `train.data.sources.identity`."""
        return self._records.identity

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        sample = self._records[index]
        if not self._encoded:
            return sample
        where = f'{self._folder}: sample {index}'
        return sample | {'video': mp4_bytes.decode(sample['video'], self.protocol['frames'], where)}
