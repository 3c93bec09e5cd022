"""Pictures that Pillow cannot read, whatever it raises."""

import numpy as np
import pytest
from PIL import Image

from projects.data.id_maps import image_size, read_id_map
from projects.errors import DataError
from projects.evaluation.panoptic_files import read_segment_map


@pytest.mark.parametrize("read", [image_size, read_id_map, read_segment_map])
@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, Image.DecompressionBombError])
def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch, read, error):
    def opened(path):
        raise error("damaged")

    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(DataError, match=f"map.png cannot be read: {error.__name__}: damaged"):
        read(tmp_path / "map.png")


@pytest.mark.parametrize("read", [image_size, read_id_map, read_segment_map])
def test_a_header_of_absurd_size(tmp_path, read):
    path = tmp_path / "map.bmp"
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(content)
    with pytest.raises(DataError, match="map.bmp cannot be read: DecompressionBombError"):
        read(path)


@pytest.mark.parametrize("read", [read_id_map, read_segment_map])
def test_a_damaged_body(tmp_path, read):
    path = tmp_path / "map.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 9, (64, 64), dtype=np.uint8)).save(path)
    assert image_size(path) == (64, 64)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="map.png cannot be read"):
        read(path)
