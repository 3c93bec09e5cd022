"""demo.py: what it leaves for images, folders and videos, and how it ends."""

import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from projects.engine.launch import guarded
from projects.predictor import Video, write_video
from projects.visualization import draw

SCRIPT = Path(__file__).resolve().parent.parent / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_files(tiny_cfg, tmp_path):
    """--config-file and --weights of a small Mask R-CNN with random weights that finds something in every image."""
    cfg = tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 3)
    (tmp_path / "model").mkdir()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model/weights.pth")
    (tmp_path / "model/config.yaml").write_text(cfg.dump())
    return "--config-file", tmp_path / "model/config.yaml", "--weights", tmp_path / "model/weights.pth"


@pytest.fixture
def inputs(shapes_root, tmp_path):
    """Two folders with a picture of the same name, one in a subfolder, a video and a broken picture."""
    photo = cv2.imread(str(next((shapes_root / "shapes/coco/val").iterdir())))
    folder = tmp_path / "in"
    for name in ("a/photo.png", "a/below/other.png", "b/photo.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), photo)
    (folder / "a/notes.txt").write_text("not for looking at")
    (folder / "b/broken.jpg").write_text("no image")
    write_video(folder / "b/clip.mp4", [np.full((96, 128, 3), 60 * i, np.uint8) for i in range(3)], 10)
    return folder


def test_pictures_video_and_results(model_files, inputs, tmp_path, run_script):
    output = tmp_path / "out"
    done = run_script(
        "demo.py", *model_files, "--input", inputs / "a", inputs / "b", inputs / "a/*.png", tmp_path / "none.png",
        "--output", output, "--score-threshold", 0, "--batch-size", 2, "--color-by", "class",
        "--opts", "MODEL.DEVICE", "cpu",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and "none.png" in failed[0] and "broken.jpg: damaged or no image (" in failed[1]
    assert "No prediction" not in done.stdout
    assert "Traceback" not in done.stderr

    names = {path.name for path in output.iterdir()}
    assert names == {"photo.png", "photo-2.png", "other.png", "clip.mp4", "predictions.json"}
    with Image.open(inputs / "a/photo.png") as before, Image.open(output / "photo.png") as after:
        assert after.size[0] % before.size[0] == 0 and after.size[0] > before.size[0]
    video = Video(output / "clip.mp4")
    assert (video.frame_count, round(video.frames_per_second)) == (3, 10)

    results = json.loads((output / "predictions.json").read_text())
    images = {(r["image_id"], r["file_name"], r.get("frame")) for r in results}
    assert len({i for i, *_ in images}) == len(images) == 6, "an image_id stands for two images"
    clip = str(inputs / "b/clip.mp4")
    assert sorted(frame for _, name, frame in images if name == clip) == [0, 1, 2]
    for result in results:
        size = (96, 128) if result["file_name"] == clip else Image.open(result["file_name"]).size[::-1]
        assert mask_util.decode(result["segmentation"]).shape == size
        assert len(result["bbox"]) == 4 and 0 <= result["score"] <= 1
        assert 1 <= result["category_id"] <= 8, "not the data set's own ids"
    boxes = {name: [r["bbox"] for r in results if r["file_name"].endswith(name)] for name in ("a/photo.png", "b/photo.png")}
    np.testing.assert_allclose(boxes["a/photo.png"], boxes["b/photo.png"], atol=1e-2)


def run(demo, *args) -> int:
    return guarded(demo.main, demo.parse_args([str(arg) for arg in args]))


def test_all_well_ends_with_zero(demo, model_files, inputs, tmp_path, capsys):
    photo = inputs / "a/photo.png"
    assert run(demo, *model_files, "--input", photo, "--output", tmp_path / "out", "--score-threshold", 1) == 0
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == []
    said = capsys.readouterr().out
    assert "1 images and frames, 0 predictions" in said and "No prediction scores 1.0 or more (the best: 0." in said
    assert "a lower --score-threshold" in said
    bare = draw(read_image(str(photo), "RGB"), {"annotations": []}, Metadata(name="of no class"))
    np.testing.assert_array_equal(read_image(str(tmp_path / "out/photo.png"), "RGB"), bare)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--config-file": "no.yaml"}, "no.yaml"),
        ({"--weights": "no.pth"}, "no.pth"),
        ({"--weights": ""}, "--weights"),
        ({"--input": "no.png"}, "no.png: no such file"),
        ({"--score-threshold": "50"}, "50.0"),
        ({"--batch-size": "0"}, "at least 1"),
        ({"--opts": "MODEL.NOTHING 1"}, "MODEL.NOTHING"),
        ({"--output": "in/a"}, "would be overwritten"),
    ],
)
def test_what_a_user_can_mend_ends_with_two(demo, model_files, inputs, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    pairs = dict(zip(model_files[::2], model_files[1::2], strict=True))
    pairs |= {"--input": "in/a/photo.png", "--output": "out"} | change
    args = [word for flag, value in pairs.items() for word in (flag, *(str(value).split(" ")))]
    before = (inputs / "a/photo.png").read_bytes()
    assert run(demo, *args) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (inputs / "a/photo.png").read_bytes() == before


def test_hostile_weights_need_trust(demo, model_files, inputs, tmp_path, capsys):
    weights = model_files[-1]
    torch.save({"model": torch.load(weights)["model"], "more": Path("x")}, weights)
    args = (*model_files, "--input", inputs / "a/photo.png", "--output", tmp_path / "out")
    assert run(demo, *args) == 2
    assert "--trust" in capsys.readouterr().err
    assert run(demo, *args, "--trust") == 0


def test_inputs_are_found_once_and_not_in_the_output(demo, inputs):
    output = inputs / "a/out"
    output.mkdir()
    shutil.copy(inputs / "a/photo.png", output / "photo.png")
    shutil.copy(inputs / "a/photo.png", inputs / "[1].PNG")
    (inputs / "empty").mkdir()
    arguments = ["a", "a/photo.png", "b/../a/*.png", "[1].PNG", "empty", "b/*.gif", "b/clip.mp4"]
    files, failures = demo.find_inputs([str(inputs / name) for name in arguments], output)
    assert [path.name for path in files] == ["other.png", "photo.png", "[1].PNG", "clip.mp4"]
    assert [Path(name).name for name in failures] == ["empty", "*.gif"]


def test_outputs_never_share_a_name(demo, tmp_path):
    names = ["a/x.png", "b/x.png", "b/x-2.png", "c/X.PNG", "a/x.jpg", "a/x.mp4", "a/x.avi", "a/x.gif", "d/x"]
    targets = demo.plan_outputs([Path(name) for name in names], tmp_path)
    assert [target.name for target in targets.values()] == [
        "x.png", "x-2.png", "x-2-2.png", "X-3.PNG", "x.jpg", "x.mp4", "x-2.mp4", "x-4.png", "x-5.png"
    ]  # fmt: skip


class Finds:
    """Stands for a predictor that gives the same output for every item."""

    def __init__(self, output, **metadata):
        self.output, self.metadata = output, Metadata(name="made up", **metadata)

    def __call__(self, items):
        return ((item, self.output) for item in items)


def show(demo, inputs, tmp_path, predictor, threshold=0.5):
    work = demo.Demo(predictor, threshold, "instance")
    failures = work.run({inputs / "a/photo.png": tmp_path / "shown.png"})
    assert failures == {} and (tmp_path / "shown.png").is_file()
    return work.results


def test_panoptic_and_semantic_outputs(demo, inputs, tmp_path):
    with Image.open(inputs / "a/photo.png") as image:
        width, height = image.size
    ids = {"thing_dataset_id_to_contiguous_id": {18: 1}, "stuff_dataset_id_to_contiguous_id": {92: 1, 94: 0}}
    segments = torch.zeros((height, width), dtype=torch.int64)
    segments[10:30, 20:60], segments[60:] = 1, 2
    info = [{"id": 1, "category_id": 1, "isthing": True, "score": 0.75}, {"id": 2, "category_id": 1, "isthing": False}]
    thing, stuff = show(demo, inputs, tmp_path, Finds({"panoptic_seg": (segments, info)}, **ids))
    assert (thing["category_id"], thing["bbox"], thing["score"]) == (18, [20, 10, 40, 20], 0.75)
    assert (stuff["category_id"], mask_util.area(stuff["segmentation"])) == (92, (height - 60) * width)
    assert {thing["image_id"], stuff["image_id"]} == {1} and thing["file_name"].endswith("photo.png")

    (rest,) = show(demo, inputs, tmp_path, Finds({"panoptic_seg": (segments, info)}, **ids), threshold=0.8)
    assert rest == {**stuff}  # the segment that scores less is void
    labels, kept = demo.confident_segments(segments, info, 0.8)
    assert labels.unique().tolist() == [0, 2] and [segment["id"] for segment in kept] == [2] and (segments == 1).any()

    same = show(demo, inputs, tmp_path, Finds({"panoptic_seg": (segments - 1 + 1000 * (segments > 1), None)},
                                              label_divisor=1000, **ids))  # fmt: skip
    assert [(r["category_id"], mask_util.area(r["segmentation"])) for r in same] == [
        (94, 800),
        (18, (height - 60) * width),
    ]

    logits = torch.zeros((2, height, width))
    logits[1, 60:] = 1
    rest, sky = show(demo, inputs, tmp_path, Finds({"sem_seg": logits}, **ids))
    assert (rest["category_id"], sky["category_id"]) == (94, 92)
    assert mask_util.area(sky["segmentation"]) == (height - 60) * width


def test_threshold_and_keypoints(demo, inputs, tmp_path):
    with Image.open(inputs / "a/photo.png") as image:
        found = Instances(image.size[::-1], pred_boxes=Boxes([[1.0, 2, 11, 22], [5, 5, 9, 9]]))
    found.scores, found.pred_classes = torch.tensor([0.8, 0.4]), torch.tensor([3, 3])
    found.pred_keypoints = torch.tensor([[[4.5, 6.5, 0.9]], [[6.0, 6.0, 0.9]]])
    finds = Finds({"instances": found}, thing_dataset_id_to_contiguous_id={18: 3})
    (result,) = show(demo, inputs, tmp_path, finds)
    assert result["bbox"] == [1, 2, 10, 20] and result["category_id"] == 18
    assert result["keypoints"] == pytest.approx([4, 6, 0.9])  # COCO's are pixel indices


def test_class_names_come_from_the_annotations(demo, tmp_path, caplog):
    def load():
        MetadataCatalog.get("named_late").thing_classes = ["gland"]
        return []

    def missing():
        raise FileNotFoundError("annotations.json")

    for name, loader in (("named_late", load), ("never_named", missing)):
        DatasetCatalog.register(name, loader)
    try:
        for name in ("named_late", "never_named", "not registered"):
            demo.read_class_names(MetadataCatalog.get(name))
    finally:
        for name in ("named_late", "never_named"):
            DatasetCatalog.remove(name)
    assert MetadataCatalog.get("named_late").thing_classes == ["gland"]
    assert "'never_named' cannot be read: annotations.json" in caplog.text


def test_frames_keep_their_colours(demo, tmp_path):
    write_video(tmp_path / "clip.mp4", [np.full((96, 128, 3), (200, 60, 20), np.uint8)] * 2, 10)
    nothing = {"instances": Instances((96, 128), scores=torch.zeros(0), pred_boxes=Boxes(torch.zeros(0, 4)))}
    work = demo.Demo(Finds(nothing), 0.5, "class")
    assert work.run({tmp_path / "clip.mp4": tmp_path / "shown.mp4"}) == {}
    frames = list(Video(tmp_path / "shown.mp4"))
    assert [frame.shape for frame in frames] == [(5 * 96, 5 * 128, 3)] * 2 and work.count == 2
    assert work.why_nothing() == "The model finds nothing in them, whatever the score."
    np.testing.assert_allclose(frames[1][200, 300].astype(int), (20, 60, 200), atol=12)


def test_what_cannot_be_read_or_written_is_named(demo, inputs, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    work = demo.Demo(Finds({"instances": Instances((96, 128), scores=torch.zeros(0))}), 0.5, "class")
    frame = cv2.imwrite(str(tmp_path / "frame.png"), np.zeros((96, 128, 3), np.uint8)) and tmp_path / "frame.png"
    targets = {
        tmp_path / "text.mp4": tmp_path / "text-2.mp4",
        frame: tmp_path / "no folder/frame.png",
        inputs / "b/clip.mp4": tmp_path / "no folder/clip.mp4",
    }
    failures = work.run(targets)
    assert set(failures) == {str(path) for path in targets}
