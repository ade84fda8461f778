"""Images of requests, decoded and resized to the engine's size in threads, by the transform that evaluation uses."""

from __future__ import annotations

import asyncio
import warnings
from functools import lru_cache

from PIL import Image

from prompttune.export.runtimes import Array
from prompttune.images import TooManyPixelsError, read_image
from prompttune.images.preprocess import Preprocess
from prompttune.serve.decode_threads import single_threaded_pool
from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, TooLargeError
from prompttune.serve.service.tensors import RowImage

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that are decoded, by Pillow's names: each further decoder is one more that strangers can reach."""

TRANSFORMS = 64
"""Number of transforms to keep; a server rarely sees more than a few."""


class Decoder:
    """A pool of threads that turn the images of requests into the engine's input.

    Pillow's warnings about damaged or large files are switched off for the process: the images of strangers say nothing
    about the server and would fill its log.

    Args:
        workers: number of threads; each holds one decoded image at a time.
        limits: limits of a request; ``pixels`` also bounds an image while it is resized.
    """

    def __init__(self, workers: int, limits: Limits) -> None:
        self._limits = limits
        self._transform = lru_cache(TRANSFORMS)(Preprocess.transform)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._pool = single_threaded_pool(workers)

    async def prepare(self, preprocess: Preprocess, payload: RowImage) -> Array:
        """Decode and transform one image. Cancelling the caller removes its image from the queue.

        Args:
            preprocess: the evaluation transform of the row's task.
            payload: the image; a normalised image is returned unchanged.

        Returns:
            Normalised float32 [3, S, S].

        Raises:
            TooLargeError: the image exceeds the pixel limit, or its sides would make it do so when it is resized.
            BadRequestError: the image cannot be read.
        """
        if payload.normalised:
            return payload.data  # type: ignore[return-value]
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._prepare, preprocess, payload)

    def close(self) -> None:
        """Drop the waiting images and end each thread after its current one."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, preprocess: Preprocess, payload: RowImage) -> Array:
        row, data = payload.row, payload.data
        try:
            image = read_image(data, formats=FORMATS, max_pixels=self._limits.pixels)  # type: ignore[arg-type]
            self._check_sides(preprocess, image)
            prepared: Array = self._transform(preprocess)(image).numpy()
        except TooManyPixelsError as problem:
            raise TooLargeError(f"image of row {row}: {problem}") from None
        except OSError as problem:
            raise BadRequestError(f"image of row {row} cannot be read: {problem}") from None
        except ValueError as problem:  # the shorter side rounds to 0 pixels when the longer one fits
            raise BadRequestError(f"image of row {row} cannot be resized: {problem}") from None
        return prepared

    def _check_sides(self, preprocess: Preprocess, image: Image.Image) -> None:
        if preprocess.resized_pixels(image.width, image.height) > self._limits.pixels:
            raise TooManyPixelsError(
                f"its sides of {image.width} x {image.height} pixels differ too much; resized it could have more than "
                f"{self._limits.pixels} pixels"
            )
