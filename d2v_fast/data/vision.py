"""Images: a folder or a Hugging Face set → augmented crops → pixels and patch mask (spec 3.3)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from d2v_fast.data import DataError, PretrainingData, Source, find_files, is_local, load_media
from d2v_fast.data.builtin import builtin_images
from d2v_fast.masking import BlockMask, Draws, RandomMask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the channels of ImageNet
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits; Pillow's own conversion would cut 16 bits off at 255, which is white."""
    if image.mode == "F":
        raise ValueError("has floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def open_images(path: str, name: str | None = None, split: str = "train") -> Source:
    """Images of "builtin", a folder (labels are the names of their folders) or a Hugging Face set, here (parquet) or by name.

    Raises:
        DataError: No image is there.
    """
    if path == "builtin":
        return builtin_images(split)
    path = os.path.expanduser(path)
    if is_local(path):
        found = find_files(path, (*SUFFIXES, ".parquet"))
        if files := [file for file in found if not file.lower().endswith(".parquet")]:
            labels = [Path(file).parent.name for file in files]
            return Source(files, lambda i: to_rgb(Image.open(files[i])), labels, file=files.__getitem__)
    import datasets

    images, file = load_media(path, name, split, datasets.Image)
    classes = [c for c, kind in images.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [str(i) for i in images[classes[0]]] if classes else None
    names = [f"{path}[{i}]" for i in range(len(images))]
    return Source(names, lambda i: to_rgb(Image.open(file(i))), labels, file=file)


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A crop of random area and aspect, resized bicubically; ten tries, then the largest centred crop that fits."""
    wide, high = image.size
    for _ in range(10):
        area = wide * high * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= wide and 0 < h <= high:
            left, top = rng.integers(0, wide - w + 1), rng.integers(0, high - h + 1)
            break
    else:
        w, h = (
            (wide, min(high, round(wide / ratio[0]))) if wide / high < ratio[0] else (min(wide, round(high * ratio[1])), high)
        )
        left, top = (wide - w) // 2, (high - h) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each scaled by U(1 - strength, 1 + strength), in random order."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized bicubically: how a probe sees an image."""
    wide, high = image.size
    side = min(wide, high)
    left, top = (wide - side) / 2, (high - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_pixels(images: list[Image.Image], mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """RGB images of one size → float32 (B, 3, H, W), normalised by channel."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]).transpose(0, 3, 1, 2)
    shift, factor = (np.array(x, dtype=np.float32).reshape(3, 1, 1) for x in (mean, std))
    return (pixels / np.float32(255) - shift) / factor


def image_processor(image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """What `center_crop` and `to_pixels` do, as an image processor of transformers."""
    from transformers import ViTImageProcessorPil  # which needs no torchvision; what it writes names no backend

    side = {"height": image_size, "width": image_size}
    return ViTImageProcessorPil(
        size={"shortest_edge": image_size},
        do_center_crop=True,
        crop_size=side,
        resample=3,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )


class ImageData(PretrainingData):
    """Augmented images.

    Args:
        path: "builtin", a folder of images, or the name of a Hugging Face set.
        name: Configuration of the Hugging Face set.
        split: Its split.
        image_size: Side of the crops in pixels; must be the encoder's.
        crop_scale: Least and greatest share of the image's area in a crop.
        crop_ratio: Least and greatest aspect ratio of a crop.
        flip: Probability of a horizontal flip.
        jitter: Strength of brightness, contrast and saturation jitter, 0 for none.
        mean: Subtracted from each channel, ImageNet's by default.
        std: Each channel is divided by it, ImageNet's by default.
        mask: How patches are masked.
        seed: Seed of masks, augmentations and order.
    """

    def __init__(
        self,
        *,
        mask: BlockMask | RandomMask,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        image_size: int = 224,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.4,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
    ):
        self.name, self.mask, self.seed = path, mask, seed
        self.image_size, self.crop_scale, self.crop_ratio = image_size, tuple(crop_scale), tuple(crop_ratio)
        self.flip, self.jitter, self.mean, self.std = flip, jitter, tuple(mean), tuple(std)
        self.source = open_images(path, name, split)

    def __len__(self) -> int:
        return len(self.source)

    def sample_name(self, index: int) -> str:
        return self.source.names[index]

    def fit_to(self, encoder: Any) -> None:
        expected = getattr(getattr(encoder.model, "config", None), "image_size", self.image_size)
        if expected not in (self.image_size, (self.image_size,) * 2, [self.image_size] * 2):
            raise DataError(
                f"data.image_size={self.image_size}: the encoder takes {expected}; "
                f"set data.image_size or encoder.config.image_size"
            )
        self.grid = encoder.positions(self.image_size)
        if not isinstance(self.grid, tuple):
            raise DataError(
                f"encoder.model: {type(encoder.model).__name__} needs a method positions(image_size) that returns "
                "the rows and columns of patches"
            )
        patches = self.grid[0] * self.grid[1]
        if isinstance(self.mask, BlockMask) and self.mask.count >= patches:
            raise DataError(
                f"mask.count={self.mask.count}: an image has {patches} patches, and some must stay visible; "
                f"the recipe masks about 60 % of them, mask.count={round(0.6 * patches)}"
            )

    def processor(self, encoder: Any) -> Any:
        return image_processor(self.image_size, self.mean, self.std)

    def load(self, index: int, rng: np.random.Generator) -> Image.Image:
        image = random_resized_crop(self.source.read(index), self.image_size, self.crop_scale, self.crop_ratio, rng)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return color_jitter(image, self.jitter, rng) if self.jitter > 0 else image

    def collate(self, samples: list[Image.Image], draws: Draws) -> dict[str, np.ndarray]:
        return {"source": to_pixels(samples, self.mean, self.std), "mask": self.mask(draws, self.grid)}
