"""Methods for multimodal and language models, and what goes with them: encoding a reduced prompt, sampling frames of a
video, finding a filter layer."""

from tokred.vlm.encode import encode
from tokred.vlm.filter_layer import find_filter_layer
from tokred.vlm.frames import Sampled, read_video, sample_frames

__all__ = ["Sampled", "encode", "find_filter_layer", "read_video", "sample_frames"]
