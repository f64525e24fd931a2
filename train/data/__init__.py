"""Samples on disk: TFDS datasets of ArrayRecord files, read and written without TensorFlow.

A program trains on any `Source`. `SampleSource` reads the sample sets that `train.teacher_samples`,
`train.captioned_clips`, `train.latents`, `train.prompts` and any other user of `SampleWriter` write.
"""

from train.data.record_spec import DTYPES, ArraySpec, RecordSpec, SampleSpec
from train.data.sample_source import SampleSource
from train.data.sample_writer import SampleWriter
from train.data.sources import Source

__all__ = ['DTYPES', 'ArraySpec', 'RecordSpec', 'SampleSource', 'SampleSpec', 'SampleWriter', 'Source']
