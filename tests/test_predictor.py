"""Predicting for many images: equal to DefaultPredictor, in order, whatever some files are like."""

import threading

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from projects.errors import CheckpointError, ConfigError, DataError
from projects.predictor import BatchedPredictor, Video, write_video


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    """A small Mask R-CNN with random weights in a file, which finds something in every image."""
    cfg = tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5)
    torch.manual_seed(3)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


@pytest.fixture
def images(shapes_root):
    return sorted((shapes_root / "shapes/coco/val").glob("*"))[:7]


def assert_equal(output, expected, tolerance=0.0):
    output, expected = output["instances"], expected["instances"]
    assert output.image_size == expected.image_size
    assert len(output) == len(expected) > 0
    assert output.get_fields().keys() == expected.get_fields().keys()
    np.testing.assert_allclose(output.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=tolerance)
    np.testing.assert_allclose(output.scores, expected.scores, rtol=0, atol=tolerance)
    assert torch.equal(output.pred_classes, expected.pred_classes)
    assert (output.pred_masks != expected.pred_masks).float().mean() <= tolerance


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_one_by_one_equals_default_predictor(cfg, images, tmp_path, input_format):
    cfg.INPUT.FORMAT = input_format
    arrays = [cv2.imread(str(path)) for path in images[:3]]
    arrays[1] = arrays[1][:90, :70]
    default = DefaultPredictor(cfg)
    ours = BatchedPredictor(cfg)
    outputs = list(ours(arrays))
    assert [item is array for (item, _), array in zip(outputs, arrays, strict=True)] == [True] * 3
    for array, (_, output) in zip(arrays, outputs, strict=True):
        assert_equal(output, default(array))
    cv2.imwrite(str(tmp_path / "same.png"), arrays[0])
    assert_equal(next(ours([tmp_path / "same.png"]))[1], default(arrays[0]))
    assert ours.metadata is default.metadata


def test_batches_equal_single_images_in_order(cfg, images):
    single = dict(BatchedPredictor(cfg)(images))
    batched = BatchedPredictor(cfg, batch_size=3)
    sizes = []
    batched.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    outputs = list(batched(iter(images)))
    assert sizes == [3, 3, 1]
    assert [item for item, _ in outputs] == images
    for item, output in outputs:
        assert_equal(output, single[item], tolerance=1e-3)


def test_images_of_several_sizes_in_a_batch(cfg, images):
    arrays = [np.ascontiguousarray(cv2.imread(str(images[0]))[: 128 - 10 * i, : 100 + 10 * i]) for i in range(4)]
    outputs = [output["instances"] for _, output in BatchedPredictor(cfg, batch_size=4)(arrays)]
    assert [output.image_size for output in outputs] == [array.shape[:2] for array in arrays]
    assert [tuple(output.pred_masks.shape[1:]) for output in outputs] == [array.shape[:2] for array in arrays]


def test_unreadable_inputs_are_reported_in_their_place(cfg, images, tmp_path):
    text, half = tmp_path / "text.jpg", tmp_path / "half.png"
    text.write_text("no image")
    half.write_bytes(images[0].read_bytes()[:2000])
    items = [text, images[0], tmp_path / "missing.png", half, np.zeros((4, 4)), images[1], str(images[2])]
    predictor = BatchedPredictor(cfg, batch_size=2)
    outputs = list(predictor(items))
    assert [item is expected for (item, _), expected in zip(outputs, items, strict=True)] == [True] * len(items)
    failed = [isinstance(output, Exception) for _, output in outputs]
    assert failed == [True, False, True, True, True, False, False]
    assert "text.jpg" in str(outputs[0][1]) and isinstance(outputs[2][1], FileNotFoundError)
    good = BatchedPredictor(cfg)
    for item, output in (outputs[1], outputs[5], outputs[6]):
        assert_equal(output, next(good([item]))[1], tolerance=1e-3)
    assert list(predictor([])) == []
    assert [type(output) for _, output in predictor([text])] == [type(outputs[0][1])]


def test_reading_ahead_is_bounded_and_ends_with_the_caller(cfg, images):
    pulled = []
    endless = (pulled.append(i) or images[i % 7] for i in iter(lambda: len(pulled), None))
    threads = threading.active_count()
    running = BatchedPredictor(cfg, batch_size=2, threads=3)(endless)
    for _ in range(3):
        next(running)
    assert len(pulled) <= 3 + 3 * 2 + 1  # taken, a batch, two batches ahead
    running.close()
    assert threading.active_count() == threads


def test_a_gpu_that_is_not_there_is_the_cpu(cfg, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level("INFO", logger="projects")
    cfg.MODEL.DEVICE = "cuda:0"
    cfg.freeze()
    assert next(BatchedPredictor(cfg).model.parameters()).device.type == "cpu"
    assert "'cuda:0' and there is no GPU" in caplog.text
    assert cfg.MODEL.DEVICE == "cuda:0", "the caller's config was changed"


@pytest.mark.gpu
def test_on_a_gpu(cfg, images):
    cfg.MODEL.DEVICE = "cuda"
    array = cv2.imread(str(images[0]))
    (_, output), (_, other) = BatchedPredictor(cfg, batch_size=2)([array, array])
    assert output["instances"].scores.is_cuda
    assert len(output["instances"]) == len(other["instances"]) > 0


def test_weights_and_settings_that_do_not_fit_are_refused(cfg, tmp_path):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(CheckpointError, match="weights.pth.*do not fit.*roi_heads"):
        BatchedPredictor(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        BatchedPredictor(cfg)
    cfg.MODEL.WEIGHTS = ""
    assert not BatchedPredictor(cfg).model.training
    with pytest.raises(ConfigError, match="Batch size.* 0 "):
        BatchedPredictor(cfg, batch_size=0)
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ConfigError, match="INPUT.FORMAT is 'L'"):
        BatchedPredictor(cfg)


def flat_frames(count, size=(48, 64)):
    """RGB frames of one colour each."""
    return [np.full((*size, 3), (40 * i, 200 - 30 * i, 90), np.uint8) for i in range(count)]


def test_video_round_trip(tmp_path):
    path = tmp_path / "clip.mp4"
    assert write_video(path, iter(flat_frames(5)), frames_per_second=12.0) == 5
    video = Video(path)
    assert (video.frame_count, round(video.frames_per_second)) == (5, 12)
    for _ in range(2):  # every pass starts from the first frame
        frames = list(video)
        assert [frame.shape for frame in frames] == [(48, 64, 3)] * 5
        for frame, expected in zip(frames, flat_frames(5), strict=True):
            np.testing.assert_allclose(frame[20, 30, ::-1].astype(int), expected[20, 30], atol=12)


def test_videos_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(DataError, match=name):
            Video(tmp_path / name)
    with pytest.raises(DataError, match="no frames"):
        write_video(tmp_path / "none.mp4", [], 10)
    with pytest.raises(DataError, match="cannot be written"):
        write_video(tmp_path / "no folder" / "clip.mp4", flat_frames(1), 10)
    write_video(tmp_path / "odd.mp4", flat_frames(2, size=(49, 65)), 10)
    assert [frame.shape for frame in Video(tmp_path / "odd.mp4")] == [(48, 64, 3)] * 2


def test_frames_of_a_video(cfg, tmp_path):
    write_video(tmp_path / "clip.mp4", flat_frames(4), 10)
    outputs = list(BatchedPredictor(cfg, batch_size=3)(Video(tmp_path / "clip.mp4")))
    assert [output["instances"].image_size for _, output in outputs] == [(48, 64)] * 4
