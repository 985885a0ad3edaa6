"""Image files to tensors and back."""

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import RidfrError, in_one_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # whatever a file is called, Pillow tries no others (PostScript, ...)
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MOST_PIXELS = 89_478_485  # from here on Pillow itself warns of a decompression bomb
LEAST_SIDE = 16
LONGEST = 16  # times as long as wide


class PictureError(RidfrError):
    """An image file cannot be used. reason: why, in a few words, for a list of files; the message is the sentence."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"The picture '{path}' cannot be used: {reason}.")
        self.reason = reason


def read_image(path: Path) -> Tensor:
    """[3,H,W] in [0,1], see `read_picture`."""
    return torch.from_numpy(numpy.array(read_picture(path))).permute(2, 0, 1).float() / 255


def read_picture(path: Path) -> Image.Image:
    """An image file as RGB of 8 bits, upright as its EXIF says; of an animation or of several pages the first.

    What is transparent lies on white. Grey may have 16 bits, or be floats from 0 to 1.
    Raises PictureError: no file, none of FORMATS, damaged, of too many or too few pixels, not finite.
    """
    if not path.is_file():  # opening a named pipe would wait for somebody to write into it
        raise PictureError(path, "it is not a file")
    try:
        with Image.open(path, formats=FORMATS) as file:
            _check_size(path, *file.size)
            return _in_rgb(path, ImageOps.exif_transpose(file))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(path, f"it has more than {MOST_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise PictureError(path, "it is not an image") from error
    except Exception as error:  # of almost every kind, by format and damage
        raise PictureError(path, f"it is damaged: {in_one_line(error)}") from error


def _check_size(path: Path, width: int, height: int) -> None:
    """Before any pixel is decoded."""
    if width * height > MOST_PIXELS:
        raise PictureError(path, f"it has {width}x{height} pixels, more than {MOST_PIXELS:,}")
    if min(width, height) < LEAST_SIDE:
        raise PictureError(path, f"it has {width}x{height} pixels, and each side must have at least {LEAST_SIDE}")
    if max(width, height) > LONGEST * min(width, height):
        raise PictureError(path, f"it has {width}x{height} pixels, more than {LONGEST} times as long as wide")


def _in_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would cut these off at 255
        return Image.fromarray(_grey(path, image)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey(path: Path, image: Image.Image) -> numpy.ndarray:
    """Grey of more than 8 bits as uint8 [H,W]; integers of 32 bits are taken for 16, as ComfyUI takes them."""
    white = 1 if image.mode == "F" else 65535
    values = numpy.asarray(image, dtype=numpy.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN fails, too
        raise PictureError(path, f"its values go from {low:g} to {high:g}, but must lie between 0 and {white}")
    return (values * (255 / white)).round().astype(numpy.uint8)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3,H,W] -> [3,*size]."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
