"""A DSG that computes in milliseconds: the shapes config, narrowed, and images of 64 x 96 pixels with two objects."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from projects import config_path, load_config
from projects.modeling.build import build_model

NARROW = [
    "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.RPN.CONV_DIMS", [8], "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 12, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 60, "MODEL.RPN.PRE_NMS_TOPK_TEST", 60, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 9,
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64,
]  # fmt: skip
SWITCHES = ("FUSION_MASK", "SGRA_BOX", "FUSION_BOX", "SGRA_MASK")


@pytest.fixture
def small_cfg():
    """``small_cfg(KEY, VALUE, ..., config=...)``"""

    def build(*opts, config: str = "dsg/shapes_dsg_R_18_FPN.yaml"):
        return load_config(config_path(config), [*NARROW, *opts])

    return build


@pytest.fixture
def small_model(small_cfg):
    """``small_model(KEY, VALUE, ...)``: a built model whose mask and box logits differ from RoI to RoI, in eval mode."""

    def build(*opts, **kwargs):
        torch.manual_seed(0)
        model = build_model(small_cfg(*opts, **kwargs)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("predictor.weight", "cls_score.weight", "bbox_pred.weight")):
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build


@pytest.fixture
def switches():
    """``switches(FUSION_BOX=True)``: overrides that set the named switches and switch the other ones off."""
    return lambda **on: [word for key in SWITCHES for word in (f"MODEL.DSG.{key}", on.get(key, False))]


@pytest.fixture
def inputs():
    """Two images: the first with two objects, side by side; the second with none."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, 10:50, 8:40] = True
    masks[1, 20:60, 36:80] = True
    boxes = Boxes(torch.tensor([[8.0, 10.0, 40.0, 50.0], [36.0, 20.0, 80.0, 60.0]]))
    objects = Instances((64, 96), gt_boxes=boxes, gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
    return [
        {"image": image, "height": 64, "width": 96, "instances": objects[rows]}
        for image, rows in zip(images, ([0, 1], []), strict=True)
    ]


@pytest.fixture
def storage():
    with EventStorage(0) as found:
        yield found


@pytest.fixture
def inputs_of():
    """``inputs_of(module)``: a list that fills with the positional arguments of every call of the module."""
    handles = []

    def watch(module) -> list:
        calls = []
        handles.append(module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments)))
        return calls

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def cascade(small_model):
    """``cascade("htc", KEY, VALUE, ..., SEMANTIC=False)``: a narrow cascade of configs/dsg/shapes_*, its keys of MODEL.DSG by
    name, in eval mode, whose stages move boxes by a pixel or two."""

    def build(name: str, *opts, **switches):
        of_dsg = [word for key, value in switches.items() for word in (f"MODEL.DSG.{key}", value)]
        model = small_model(*opts, *of_dsg, config=f"dsg/shapes_{name}_R_18_FPN.yaml")
        for predictor in model.roi_heads.box_predictor:
            torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.05)
        return model

    return build


@pytest.fixture
def labelled(inputs):
    """``inputs`` with semantic maps."""
    generator = torch.Generator().manual_seed(2)
    return [{**x, "sem_seg": torch.randint(0, 11, (64, 96), generator=generator)} for x in inputs]
