"""RoI heads of MaskPlus on made-up features: a step takes milliseconds."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from projects import load_config

REPO = Path(__file__).resolve().parents[2]
CHANNELS = 8
NARROW = [
    "MODEL.MASKPLUS.CONV_DIMS", [12, CHANNELS], "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 4, "SOLVER.MAX_ITER", 10, "MODEL.DEVICE", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Heads:
    """RoI heads with features, proposals and ground truth of two images of 96 x 64 and 64 x 96 pixels in a padded batch."""

    sizes = ((96, 64), (64, 96))  # height, width

    def __init__(self, *opts, seed: int = 0, name: str = "MaskPlusROIHeads"):
        config = str(REPO / "configs/maskplus/Base-shapes.yaml")
        self.cfg = load_config(config, [*NARROW, "MODEL.ROI_HEADS.NAME", name, *opts])
        torch.manual_seed(seed)
        strides = {f"p{level}": 2**level for level in range(2, 7)}
        shapes = {name: ShapeSpec(channels=CHANNELS, stride=stride) for name, stride in strides.items()}
        self.module = build_roi_heads(self.cfg, shapes)
        generator = torch.Generator().manual_seed(1)
        self.features = {
            name: torch.randn(2, CHANNELS, -(-96 // stride), -(-96 // stride), generator=generator)
            for name, stride in strides.items()
        }

    def train(self, iteration: int = 0, objects: bool = True) -> dict[str, torch.Tensor]:
        """The losses of a forward pass; the sampled proposals are the same every time."""
        targets, proposals = [], []
        for height, width in self.sizes:
            boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 34.0]])[: 2 if objects else 0]
            masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
            masks[:, 10:40, 15:38] = True
            classes = torch.tensor([0, 2])[: len(boxes)]
            targets.append(Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=BitMasks(masks)))
            near = Boxes(torch.tensor([[5.0, 5.0, 42.0, 47.0], [2.0, 30.0, 60.0, 60.0], [22.0, 12.0, 61.0, 35.0]]))
            proposals.append(Instances((height, width), proposal_boxes=near, objectness_logits=torch.zeros(3)))
        torch.manual_seed(2)
        with EventStorage(iteration) as self.storage:
            return self.module.train()(None, self.features, proposals, targets)[1]

    @torch.no_grad()
    def infer(self, images=(0, 1), cut: bool = False) -> list[Instances]:
        """Masks of given boxes; with ``cut`` the feature maps end where the image ends."""
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 34.0]])
        instances = [
            Instances(self.sizes[i], pred_boxes=Boxes(boxes), pred_classes=torch.tensor([0, 2]), scores=torch.ones(2))
            for i in images
        ]
        features = {name: level[list(images)] for name, level in self.features.items()}
        if cut:
            height, width = self.sizes[images[0]]
            for name, level in features.items():
                stride = 2 ** int(name[1])
                features[name] = level[:, :, : -(-height // stride), : -(-width // stride)]
        return self.module.eval().forward_with_given_boxes(features, instances)

    @torch.no_grad()
    def detect(self) -> list[Instances]:
        """Detections from proposals."""
        proposals = [
            Instances(size, proposal_boxes=Boxes(torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 34.0]])))
            for size in self.sizes
        ]
        return self.module.eval()(None, self.features, proposals)[0]


@pytest.fixture
def heads():
    """``heads(KEY, VALUE, ..., seed=0)``: see Heads. Keys are those of MODEL.MASKPLUS."""

    def build(*opts, **kwargs):
        words = [f"MODEL.MASKPLUS.{word}" if i % 2 == 0 and "." not in word else word for i, word in enumerate(opts)]
        return Heads(*words, **kwargs)

    return build


@pytest.fixture
def arithmetic():
    """``arithmetic(2, 3, start=5)``: a tensor of distinct numbers in [-1, 1] that no generator made."""

    def values(*shape, start: int = 0) -> torch.Tensor:
        numbers = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64)
        return torch.sin(numbers * 1.7 + 0.3).reshape(shape)

    return values


@pytest.fixture
def filled(arithmetic):
    """Fill every parameter of a module with such numbers, in double precision."""

    def fill(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for i, parameter in enumerate(module.double().parameters()):
                parameter.copy_(arithmetic(*parameter.shape, start=100 * i))
        return module

    return fill
