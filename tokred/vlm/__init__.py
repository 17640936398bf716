"""Methods for multimodal models, and what goes with them: encoding a reduced prompt, sampling frames of a video."""

from tokred.vlm.encode import encode
from tokred.vlm.frames import Sampled, read_video, sample_frames

__all__ = ["Sampled", "encode", "read_video", "sample_frames"]
