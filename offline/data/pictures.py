"""Reads pictures and videos of a chat as RGB pixels, the way a server hands them to the model's processor.

A picture's place is a path, a `data:` URL, or an object that gives the file's bytes when called (a row of a data set).
A video's place is a list of pictures' places, its frames, or the path of a video file.
"""

import base64
import io
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.processor import Processor

PicturePlace = str | Path | Callable[[], bytes]
DECODERS = (("torchcodec", "torchcodec"), ("pyav", "av"), ("opencv", "cv2"), ("decord", "decord"))  # name, module
FRAMES = 32  # of a video file where the processor does not choose them itself: what vLLM hands over by default


def open_image(place: PicturePlace) -> Image.Image:
    """The RGB picture at `place`, turned upright by its EXIF tag and, where it is transparent, laid on white, as vLLM
    does. Raises QuantizeError for what is not a whole picture."""
    file: Path | io.BytesIO
    try:
        if isinstance(place, str):
            file = io.BytesIO(base64.b64decode(place.partition(",")[2]))
        else:
            file = place if isinstance(place, Path) else io.BytesIO(place())
        with Image.open(file) as stored:
            image = ImageOps.exif_transpose(stored)
            if not image.has_transparency_data:
                return image.convert("RGB")
            image = image.convert("RGBA")
            paper = Image.new("RGB", image.size, "white")
            paper.paste(image, mask=image.getchannel("A"))
            return paper
    except QuantizeError:
        raise
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise QuantizeError(f"cannot open the image {str(place)[:80]} ({error}); mend or remove it") from None


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The picture with at most `max_pixels` pixels and its aspect kept; itself where it is small enough or no limit."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    short = max(1, math.floor(min(width, height) * scale))
    long = min(math.floor(max(width, height) * scale), max_pixels // short)
    return image.resize((long, short) if width > height else (short, long), resample=3)  # bicubic, as processors do


def open_video(place: list[PicturePlace] | Path, processor: Processor) -> tuple[list[Image.Image], object]:
    """The frames of a video as RGB pictures, and transformers' VideoMetadata of them. Of a file they are those that the
    model's video processor samples, or FRAMES evenly spaced ones. Raises QuantizeError where no decoder is installed,
    for what is no video, and for frames of several sizes."""
    from transformers.video_utils import VideoMetadata, load_video

    if isinstance(place, list):
        frames = [open_image(frame) for frame in place]
        if len(sizes := {frame.size for frame in frames}) > 1:
            shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
            raise QuantizeError(
                f"the frames of the video {str(place[0])[:80]} ... differ in size ({shown}); make them one size"
            )
        return frames, VideoMetadata(len(frames), frames_indices=list(range(len(frames))))
    decoder = next((name for name, module in DECODERS if find_spec(module)), None)
    if decoder is None:
        raise QuantizeError(
            f"the video {place} needs a decoder and none is installed; pip install torchcodec, "
            "or give the video as a list of frames"
        )
    try:
        pixels, metadata = load_video(str(place), backend=decoder, sample_indices_fn=_sampling(processor))
    except Exception as error:  # decoders raise what they like
        raise QuantizeError(f"{decoder} cannot decode the video {place} ({error!r:.200}); mend or remove it") from error
    if not isinstance(pixels, np.ndarray):  # torch's [T, 3, H, W]
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels], metadata


def _sampling(processor: Processor) -> Callable:
    """Frame numbers from a video's metadata, as transformers' video processors choose them."""
    own = processor.video_processor
    if not getattr(own, "do_sample_frames", False):
        return _evenly
    left_out = ("input_data_format", "do_convert_rgb", "do_sample_frames", "device", "video_metadata")
    names = [name for name in own.valid_kwargs.__annotations__ if name not in left_out]
    return partial(own.sample_frames, **{name: getattr(own, name, None) for name in names})


def _evenly(metadata: Any, **options: Any) -> np.ndarray:
    total = metadata.total_num_frames
    return np.linspace(0, total - 1, min(FRAMES, total)).astype(int)
