"""Images of every kind become RGB, broken ones a line, and none is written by half."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bapnal.label import files
from bapnal.label.files import finite, only_one, whole, write_json
from bapnal.label.images import read_rgb, rgb_array, write_image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((4095 * RAMP).astype(np.uint16), "png"),
        ((65535 * RAMP).astype(np.uint16), "tiff"),
        ((1e6 * RAMP - 5e5).astype(np.int32), "tiff"),
        ((1e-3 * RAMP).astype(np.float32), "tiff"),
        ((3e38 * (2 * RAMP - 1)).astype(np.float32), "tiff"),
    ],
)
def test_deep_images_are_scaled_from_their_own_range(tmp_path, values, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    pixels = read_rgb(path).pixels.permute(1, 2, 0).numpy()
    assert pixels.shape == (8, 8, 3)
    np.testing.assert_allclose(pixels[..., 0], 255 * RAMP, atol=1)


def test_odd_values_of_deep_images(tmp_path):
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    assert read_rgb(tmp_path / "odd.tiff").pixels.max() == 255
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "none.tiff")
    with pytest.raises(ValueError, match=r"none\.tiff must be an image: no pixel is finite"):
        read_rgb(tmp_path / "none.tiff")
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "flat.png")
    assert read_rgb(tmp_path / "flat.png").pixels.max() == 0


def test_transparent_images_lie_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert rgb_array(image).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert rgb_array(Image.new("LA", (1, 1), (0, 0))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    assert rgb_array(Image.new(mode, (3, 2))).shape == (2, 3, 3)


def test_turned_photographs_are_set_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (64, 40)).save(path, exif=exif)
    assert read_rgb(path).pixels.shape == (3, 64, 40)
    assert read_rgb(path, (64, 40)).turned
    assert read_rgb(path, (40, 64)).pixels.shape == (3, 40, 64)
    assert not read_rgb(path, (40, 64)).turned
    with pytest.raises(ValueError, match="50 x 50, got 40 x 64"):
        read_rgb(path, (50, 50))


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_800)).save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"must have at most 100000000 pixels .* has 108000000"):
        read_rgb(path)
    with pytest.raises(ValueError, match="at most 10 pixels"):
        read_rgb(path, None, 10)


def test_an_image_cut_by_a_full_disk_is_not_published(tmp_path, monkeypatch):
    """A disk that takes 100 bytes and says so only to who looks."""

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"a\.jpg could not be written: No space left"):
        write_image(tmp_path / "a.jpg", image, "JPEG")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_have_names_of_their_own(tmp_path):
    path, victim = tmp_path / "a.json", tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".a.json.part").symlink_to(victim)
    with whole(path) as one, whole(path) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    write_json(path, {})
    assert victim.read_text() == "untouched"
    path.unlink()
    path.symlink_to(victim)
    write_json(path, {})
    assert victim.read_text() == "untouched"
    assert not path.is_symlink()
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_holds_no_infinity(tmp_path):
    content = {"a": float("nan"), "b": [1.0, float("inf")], "c": (-float("inf"), "x")}
    assert finite(content) == {"a": None, "b": [1.0, None], "c": [None, "x"]}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_folder_is_one_process_s_own(tmp_path):
    with (
        only_one(tmp_path),
        pytest.raises(BlockingIOError, match=rf"written to by process {os.getpid()} on "),
        only_one(tmp_path),
    ):
        pass
    with only_one(tmp_path):
        pass


def test_lines_are_lines():
    assert files.one_line("a\n b\tc") == "a b c"
    assert files.one_line(os.fsdecode(b"\xff.jpg")) == "\\udcff.jpg"
