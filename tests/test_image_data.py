"""Image files of every kind compared with known pixels, and the data sets that contain them."""

import io
import logging
import re
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from packaging.version import Version
from PIL import Image, ImageCms, PngImagePlugin, features

from d2v_fast.data import DataError, load_hub, load_media
from d2v_fast.data.audio import open_audio
from d2v_fast.data.documents import load_documents
from d2v_fast.data.vision import ImageData, crop_to, image_processor, open_images, read_crop, read_image, to_rgb
from d2v_fast.masking import RandomMask

ORIENTATION = 0x112
WHITE = [255, 255, 255]


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def pixels(content):
    return np.asarray(read_image(io.BytesIO(content)))


def grey_levels(values, dtype=np.uint16):
    """The grey level to which `to_rgb` maps each integer."""
    rgb = np.asarray(to_rgb(Image.fromarray(np.array([values], dtype=dtype))))
    assert rgb.dtype == np.uint8 and (rgb == rgb[..., :1]).all()
    return rgb[0, :, 0].tolist()


def row(*values):
    return np.array([values], dtype=np.uint8)


# Where the first row and the first column of the stored pixels appear, from the EXIF standard.
SEEN = {
    1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left",
    5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom",
}  # fmt: skip


class TestOrientation:
    @pytest.mark.parametrize("orientation", SEEN)
    @pytest.mark.parametrize(
        "kind, settings",
        [
            ("JPEG", {"quality": 100, "subsampling": 0}),
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
        ],
    )
    def test_every_orientation(self, orientation, kind, settings):
        stored = np.zeros((40, 64, 3), dtype=np.uint8)
        stored[:8, :, 0] = 255  # the first row is red, the first column blue
        stored[:, :8, 2] = 255
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        seen = pixels(encoded(Image.fromarray(stored), kind, exif=exif.tobytes(), **settings)).astype(int)
        top, left = SEEN[orientation].split()
        assert seen.shape == ((40, 64, 3) if top in ("top", "bottom") else (64, 40, 3))
        edges = {"top": seen[0], "bottom": seen[-1], "left": seen[:, 0], "right": seen[:, -1]}
        assert [edge for edge in edges if edges[edge][:, 0].min() > 240] == [top]
        assert [edge for edge in edges if edges[edge][:, 2].min() > 240] == [left]

    def test_files_and_sets_are_turned_alike(self, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        content = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif.tobytes())
        (tmp_path / "a.jpg").write_bytes(content)
        pq.write_table(pa.table({"image": [{"bytes": content, "path": "a.jpg"}]}), tmp_path / "a.parquet")
        for name in ("a.jpg", "a.parquet"):
            assert open_images(str(tmp_path / name)).read(0).size == (4, 6)

    def test_damaged_metadata(self):
        # Two entries of a directory: orientation 6, and a resolution that is text, which Pillow cannot write back.
        entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHII", 0x11B, 2, 1, 0)
        content = encoded(
            Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
        )
        assert read_image(io.BytesIO(content)).size == (4, 6)
        assert read_image(io.BytesIO(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0rubbish"))).size == (6, 4)


@pytest.fixture
def picture():
    """Waves so steep that a shift by one pixel is ten levels; 403 × 301, which no power of two divides."""
    y, x = np.mgrid[0:301, 0:403]
    return Image.fromarray((127 + 127 * np.sin(np.dstack([x, y, x + y]) / 13)).astype(np.uint8))


class TestDraft:
    """JPEGs decoded at 1/2, 1/4 or 1/8, compared with the same JPEGs decoded at full size."""

    @pytest.mark.parametrize("orientation", SEEN)
    @pytest.mark.parametrize("side, shrink", [(300, 8), (150, 4), (70, 2)])
    def test_crops_are_those_of_the_whole_image(self, picture, orientation, side, shrink, monkeypatch):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        content = encoded(picture, "JPEG", exif=exif.tobytes(), quality=95)
        whole = read_image(io.BytesIO(content))
        sizes = []
        monkeypatch.setattr(
            "d2v_fast.data.vision.crop_to", lambda image, *how: sizes.append(image.size) or crop_to(image, *how)
        )
        for corner in (0, 1):  # the last pixels at every edge
            x, y = (corner * (edge - side) for edge in whole.size)
            box = (x, y, x + side, y + side)
            found = read_crop(io.BytesIO(content), 32, lambda wide, high, box=box: box if (wide, high) == whole.size else None)
            difference = np.asarray(found, dtype=float) - np.asarray(crop_to(whole, 32, box))
            assert np.abs(difference).mean() < 2 and np.abs(difference).max() < 9
        assert sizes == [tuple(-(-edge // shrink) for edge in whole.size)] * 2

    @pytest.mark.parametrize("kind, side", [("JPEG", 63), ("PNG", 300), ("WEBP", 300)])
    def test_the_same_bits_where_it_does_not_apply(self, picture, kind, side):
        content = encoded(picture, kind)
        found = read_crop(io.BytesIO(content), 32, lambda wide, high: (1, 0, 1 + side, side))
        expected = crop_to(read_image(io.BytesIO(content)), 32, (1, 0, 1 + side, side))
        assert np.array_equal(np.asarray(found), np.asarray(expected))

    @pytest.mark.parametrize("side, shrink", [(256, 8), (255, 4), (128, 4), (127, 2), (64, 2), (63, 1)])
    @pytest.mark.parametrize("upright", [True, False])
    def test_the_shorter_side_keeps_the_pixels_of_the_crop(self, picture, side, shrink, upright, monkeypatch):
        """32 of them: 256 / 8, 128 / 4 and 64 / 2 are just enough."""
        sizes = []
        monkeypatch.setattr(
            "d2v_fast.data.vision.crop_to", lambda image, *how: sizes.append(image.size) or crop_to(image, *how)
        )
        wide, high = (side, 280) if upright else (280, side)
        read_crop(io.BytesIO(encoded(picture, "JPEG")), 32, lambda *size: (20, 10, 20 + wide, 10 + high))
        assert sizes == [(-(-403 // shrink), -(-301 // shrink))]

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_modes(self, picture, mode):
        content = encoded(picture.convert(mode), "JPEG")
        found, whole = read_crop(io.BytesIO(content), 32, lambda wide, high: (0, 0, 301, 301)), read_image(io.BytesIO(content))
        difference = np.asarray(found, dtype=float) - np.asarray(crop_to(whole, 32, (0, 0, 301, 301)))
        assert np.abs(difference).mean() < 2 and np.abs(difference).max() < 9

    def test_training_uses_it(self, picture, tmp_path, monkeypatch):
        (tmp_path / "a.jpg").write_bytes(encoded(picture, "JPEG"))
        sizes = []
        monkeypatch.setattr("d2v_fast.data.vision.to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
        data = ImageData(
            path=str(tmp_path), mask=RandomMask(0.5), image_size=32, crop_scale=(1, 1), crop_ratio=(1, 1), jitter=0
        )
        data.load(0, np.random.default_rng(0))
        assert sizes == [(51, 38)]


class TestRange:
    """Integers of more than 8 bits, which Pillow would cut off at 255."""

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_the_bits_that_are_used(self, dtype):
        assert grey_levels([0, 7, 255], dtype) == [0, 7, 255]  # 8
        assert grey_levels([0, 512, 1023], dtype) == [0, 128, 255]  # 10
        assert grey_levels([0, 1024, 4095], dtype) == [0, 64, 255]  # 12
        assert grey_levels([0, 4096, 16383], dtype) == [0, 64, 255]  # 14
        assert grey_levels([0, 0x8000, 0xFFFF], dtype) == [0, 128, 255]  # 16
        assert grey_levels([0, 0], dtype) == [0, 0]

    def test_thirty_two_bits(self):
        assert grey_levels([0, 2**30, 2**31 - 1], np.int32) == [0, 64, 127]

    @pytest.mark.parametrize(
        "kind, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I"), ("PPM", "I;16")]
    )
    def test_files(self, kind, mode):
        order = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        image = Image.frombytes(mode, (3, 1), np.array([0, 1024, 4095], dtype=order).tobytes())
        assert pixels(encoded(image, kind))[0, :, 0].tolist() == [0, 64, 255]
        dark = Image.frombytes(mode, (3, 1), np.array([0, 1, 9], dtype=order).tobytes())
        assert pixels(encoded(dark, kind))[0, :, 0].tolist() == [0, 1, 9]

    @pytest.mark.parametrize("image", [Image.new("F", (1, 1)), Image.new("I", (1, 1), -3)])
    def test_an_unknown_range_is_refused(self, image):
        with pytest.raises(ValueError, match=r"has (floating-point pixels, whose|negative pixels, down to -3: save it)"):
            to_rgb(image)

    def test_colours_of_sixteen_bits(self):
        def png(*values):
            header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
            row = b"\0" + np.repeat(np.array(values, dtype=">u2"), 3).tobytes()
            chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
            return b"\x89PNG\r\n\x1a\n" + b"".join(
                struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
            )

        assert pixels(png(0, 0x8000, 0xFFFF)).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
        assert pixels(png(0, 0)).max() == 0 and pixels(png(0, 4096)).max() == 16
        for most in (256, 4095):
            with pytest.raises(ValueError, match="its colours fill 12 of 16 bits or fewer"):
                pixels(png(0, most))


class TestModes:
    def test_opaque_ones(self):
        colours = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
        image = Image.fromarray(colours)
        for mode in ("RGB", "RGBA", "P", "CMYK", "RGBX", "HSV"):
            assert np.array_equal(np.asarray(to_rgb(image.convert(mode))), colours), mode
        assert np.asarray(to_rgb(Image.fromarray(row(7)))).tolist() == [[[7] * 3]]
        assert np.asarray(to_rgb(Image.fromarray(row(0, 255)).convert("1"))).tolist() == [[[0] * 3, [255] * 3]]
        assert np.array_equal(pixels(encoded(Image.new("CMYK", (8, 8), (55, 225, 195, 0)), "JPEG"))[0, 0], [200, 30, 60])

    def test_transparent_ones_lie_on_white(self):
        black_red_nothing = Image.fromarray(np.dstack([row(0, 255, 0), row(0, 0, 0), row(0, 0, 0), row(255, 255, 0)]))
        expected = [[[0] * 3, [255, 0, 0], WHITE]]
        assert pixels(encoded(black_red_nothing)).tolist() == expected
        assert pixels(encoded(black_red_nothing, "WEBP", lossless=True)).tolist() == expected
        grey = Image.merge("LA", [Image.new("L", (1, 1), level) for level in (100, 128)])
        assert pixels(encoded(grey))[0, 0] == pytest.approx([177] * 3, abs=1)

    def test_the_exported_processor_agrees(self):
        alpha = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
        image = Image.fromarray(np.dstack([alpha, alpha.T, alpha, 255 - alpha]))
        process = image_processor(8, (0, 0, 0), (1, 1, 1))
        composites = Version(transformers.__version__) >= Version("5.21")  # earlier ones drop the transparency
        for mode in (*(["RGBA", "LA"] if composites else []), "RGB", "L", "1", "CMYK"):
            converted = image.convert(mode)
            found = process(converted, return_tensors="np")["pixel_values"][0]
            assert np.allclose(found, np.asarray(to_rgb(converted)).transpose(2, 0, 1) / 255, atol=1e-6), mode

    @pytest.mark.parametrize("mode, transparency", [("P", 1), ("P", bytes([255, 0])), ("L", 1), ("RGB", (1, 1, 1)), ("1", 1)])
    def test_transparency_stored_apart_from_the_pixels(self, mode, transparency):
        image = Image.fromarray(row(0, 1))
        if mode == "P":
            image.putpalette([0, 0, 0, 9, 9, 9])
        elif mode == "1":
            image = image.point(lambda level: 255 * level).convert("1")
        elif mode == "RGB":
            image = image.convert(mode)
        assert pixels(encoded(image, transparency=transparency)).tolist() == [[[0] * 3, WHITE]]

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_first_frame(self, kind):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
        lossless = {"lossless": True} if kind == "WEBP" else {}
        assert pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless))[4, 4].tolist() == [
            255,
            0,
            0,
        ]


class TestFiles:
    @pytest.mark.parametrize(
        "suffix", [".jpg", ".jfif", ".JPE", ".webp", ".bmp", ".pgm", ".jp2", *([".avif"] if features.check("avif") else [])]
    )
    def test_endings(self, tmp_path, suffix):
        kind = Image.registered_extensions()[suffix.lower()]
        (tmp_path / f"a{suffix}").write_bytes(encoded(Image.new("L", (16, 16), 200), kind))
        source = open_images(str(tmp_path))
        assert len(source) == 1 and np.abs(np.asarray(source.read(0), dtype=int) - 200).max() <= 3

    def test_large_metadata_of_a_png(self):
        image = Image.new("RGB", (4, 4), (1, 2, 3))
        text = PngImagePlugin.PngInfo()
        text.add_text("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(2_000_000)
        for content in (encoded(image, pnginfo=text), encoded(image, icc_profile=profile)):
            assert pixels(content)[0, 0].tolist() == [1, 2, 3]

    def test_metadata_without_end_is_refused(self):
        text = PngImagePlugin.PngInfo()
        text.add_text("bomb", "x" * (2**26 + 1), zip=True)
        with pytest.raises(ValueError, match="too large"):
            pixels(encoded(Image.new("RGB", (4, 4)), pnginfo=text))

    @pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
    def test_odd_shapes_train(self, tmp_path, size):
        Image.new("RGB", size, (255, 0, 51)).save(tmp_path / "a.png")
        data = ImageData(path=str(tmp_path), mask=RandomMask(0.5), image_size=16, jitter=0, mean=(0,) * 3, std=(1,) * 3)
        crop = np.asarray(data.load(0, np.random.default_rng(0)))
        assert crop.shape == (16, 16, 3) and (crop == [255, 0, 51]).all()

    def test_a_truncated_jpeg_is_named(self, tmp_path):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        (tmp_path / "a.jpg").write_bytes(encoded(noise, "JPEG")[:-500])
        data = ImageData(path=str(tmp_path), mask=RandomMask(0.5), image_size=16)
        ((_, message),) = data.__getitems__([(0, 0)])["broken"]
        assert message.startswith(f"{tmp_path}/a.jpg: image file is truncated")


def png(level):
    return encoded(Image.new("L", (8, 8), level))


class TestSets:
    @pytest.mark.parametrize(
        "kind",
        [
            pa.binary(),
            pa.large_binary(),
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
            pa.struct([("bytes", pa.binary()), ("width", pa.int32())]),
        ],
        ids=str,
    )
    def test_parquet_of_other_writers(self, tmp_path, kind):
        contents = [png(10), png(20), None]
        values = [{"bytes": content} for content in contents] if pa.types.is_struct(kind) else contents
        pq.write_table(pa.table({"id": [1, 2, 3], "picture": pa.array(values, kind)}), tmp_path / "a.parquet")
        source = open_images(str(tmp_path))
        assert [np.asarray(source.read(i)).max() for i in (0, 1)] == [10, 20]
        with pytest.raises(ValueError, match="is empty"):
            source.read(2)
        _, files = load_media(str(tmp_path), None, "train", datasets.Audio)
        assert [files.read(i).getvalue() for i in (0, 1)] == contents[:2]

    def test_paths_in_a_set(self, tmp_path):
        (tmp_path / "a.png").write_bytes(png(7))
        paths = [str(tmp_path / name) for name in ("a.png", "gone.png")]
        table = pa.table({"image": [{"bytes": None, "path": path} for path in paths]})
        pq.write_table(
            table.cast(pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})), tmp_path / "a.parquet"
        )
        source = open_images(str(tmp_path / "a.parquet"))
        assert np.asarray(source.read(0)).max() == 7
        with pytest.raises(FileNotFoundError, match=r"no such file: .*gone\.png"):
            source.read(1)

    def test_a_column_of_images_goes_before_one_of_bytes(self, tmp_path, caplog):
        rows = {"thumbnail": [png(1)], "image": [{"bytes": png(2), "path": None}]}
        table = datasets.Dataset.from_dict(rows)
        table.to_parquet(str(tmp_path / "bytes.parquet"))
        table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "typed.parquet"))
        assert np.asarray(open_images(str(tmp_path / "typed.parquet")).read(0)).max() == 2 and not caplog.messages
        with caplog.at_level(logging.WARNING):
            assert np.asarray(open_images(str(tmp_path / "bytes.parquet")).read(0)).max() == 1
        assert "thumbnail, image may all hold files; using column thumbnail" in caplog.text

    def test_a_folder_without_parquet_files_of_the_split(self, tmp_path):
        for name, content in (("set/a.parquet", None), ("other/a.csv", "id\n1\n")):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text(content) if content else pq.write_table(pa.table({"image": [png(1)]}), tmp_path / name)
        with pytest.raises(DataError, match=r"set: cannot be loaded as a Hugging Face data set \(name=None, split=test\)"):
            open_images(str(tmp_path / "set"), split="test")
        with pytest.raises(DataError, match=r"no column of type image, binary .*; found id \(int64\)"):
            load_media(str(tmp_path / "other"), None, "train", datasets.Image)

    def test_no_column_of_images(self, tmp_path):
        pq.write_table(pa.table({"id": [1], "caption": ["a dog"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"no column of type image, binary .*; found id \(int64\), caption \(string\)"):
            open_images(str(tmp_path))

    def test_folders_of_save_to_disk(self, tmp_path):
        def rows(*levels):
            values = {"image": [{"bytes": png(level), "path": None} for level in levels], "label": [0] * len(levels)}
            kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))
            return datasets.Dataset.from_dict(values, kinds)

        rows(1, 2).with_format("torch").save_to_disk(tmp_path / "one [x]")
        datasets.DatasetDict(train=rows(3), valid=rows(4, 5)).save_to_disk(tmp_path / "splits")
        one, valid = open_images(str(tmp_path / "one [x]")), open_images(str(tmp_path / "splits"), split="valid")
        assert [np.asarray(one.read(i)).max() for i in range(len(one))] == [1, 2] and one.labels == ["0", "0"]
        assert [np.asarray(valid.read(i)).max() for i in range(len(valid))] == [4, 5]
        for name, holds in (("one [x]", "train"), ("splits", "train, valid")):
            with pytest.raises(DataError, match=f"data.split=test: .*{re.escape(name)} has {holds}; choose one"):
                load_hub(str(tmp_path / name), None, "test")

    def test_folders_of_save_to_disk_of_text_and_audio(self, tmp_path):
        datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "text")
        assert list(load_documents(str(tmp_path / "text"))) == ["one", "two"]
        recording = datasets.Dataset.from_dict({"audio": [{"bytes": b"RIFF", "path": None}]})
        recording.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "audio")
        assert len(open_audio(str(tmp_path / "audio"))) == 1


def test_labels_are_a_column_label_where_no_column_is_of_classes(tmp_path):
    pixels = io.BytesIO()
    Image.new("RGB", (4, 4)).save(pixels, "PNG")
    rows = {"image": [pixels.getvalue()] * 2, "label": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set.parquet"))
    assert open_images(str(tmp_path)).labels == ["a", "b"]
