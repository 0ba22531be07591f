"""Folders of small images of every kind, for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = (48, 60)  # height and width of the images by name


def picture(number: int = 0, height: int = 48, width: int = 60) -> Image.Image:
    """Smooth, so that a resizing's rounding is all that differs."""
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / 9 + number), np.cos(y / 7 - number), np.sin((x + y) / 11 + 2 * number)]
    return Image.fromarray((127 + 100 * np.stack(waves, 2)).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def lying() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


IMAGE = picture()
GOOD = {
    "jpeg.jpg": encoded(IMAGE, "JPEG", quality=90),
    "progressive.jpg": encoded(IMAGE, "JPEG", progressive=True),
    "grey.jpeg": encoded(IMAGE.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(IMAGE.convert("CMYK"), "JPEG"),
    "lying.jpg": encoded(IMAGE, "JPEG", exif=lying()),
    "followed.jpg": encoded(IMAGE, "JPEG") + b"\0" * 100,
    "rgb.png": encoded(IMAGE, "PNG"),
    "deep.png": encoded(deep(IMAGE), "PNG"),
    "alpha.png": encoded(IMAGE.convert("RGBA"), "PNG"),
    "palette.png": encoded(IMAGE.convert("P"), "PNG"),
    "png_as.jpg": encoded(IMAGE, "PNG"),
    "some.bmp": encoded(IMAGE, "BMP"),
    "some.webp": encoded(IMAGE, "WEBP"),
    "some.tif": encoded(IMAGE, "TIFF"),
    "lying.tif": encoded(IMAGE, "TIFF", exif=lying()),
    "some.ppm": encoded(IMAGE, "PPM"),
}
BAD = {
    "empty.jpg": (b"", "empty"),
    "truncated.jpg": (GOOD["jpeg.jpg"][:-300], "truncated"),
    "truncated.png": (GOOD["rgb.png"][:-300], "truncated"),
    "text.jpg": (b"no image at all", "no image"),
    "gif.png": (encoded(IMAGE, "GIF"), "GIF, not one of JPEG"),
}


def undecodable(content: bytes = GOOD["rgb.png"]) -> bytes:
    """Sound at both ends."""
    middle = len(content) // 2
    return content[:middle] + b"\xee" * 40 + content[middle + 40 :]


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make_tree(root: Path, train: int = 10, val: int = 3) -> Path:
    """Two classes of so many JPEGs each; the images differ."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("cat", "dog")):
            images = (picture(2 * i + label, 40 + i, 70 - i) for i in range(count))
            files = {f"{i:03}.jpg": encoded(image, "JPEG") for i, image in enumerate(images)}
            write(root / split / name, files)
    return root
