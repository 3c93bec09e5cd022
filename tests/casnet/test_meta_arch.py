"""The whole model: losses, modes, outputs, weights, and what it says when something is missing."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

import casnet.meta_arch as meta_arch
from casnet.losses import IGNORED
from casnet.norm import synchronized
from casnet.targets import UNCOUNTED
from projects.data.mapper import build_mapper
from projects.engine.checkpoint import Checkpointer
from projects.errors import CheckpointError, ConfigError, DataError

REPO = Path(__file__).resolve().parents[2]
ROWS = sorted(path.stem for path in (REPO / "configs/casnet").glob("*.yaml") if not path.name.startswith("Base"))


def sample(height=60, width=90, seed=0):
    """A training sample of the panoptic task: a car in the upper left corner, a bus, a group and void."""
    generator = torch.Generator().manual_seed(seed)
    labels, owner = torch.zeros(height, width, dtype=torch.long), torch.zeros(height, width, dtype=torch.int16)
    labels[:24, :30], owner[:24, :30] = 13, 1
    labels[32:50, 40:70], owner[32:50, 40:70] = 15, 2
    labels[52:56], owner[52:56] = 13, UNCOUNTED
    labels[56:], owner[56:] = IGNORED, UNCOUNTED
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 30.0, 24.0], [40.0, 32.0, 70.0, 50.0]]))
    instances.gt_classes = torch.tensor([2, 4])
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "sem_seg": labels, "owner": owner, "instances": instances, "height": height, "width": width}


def without_instances(height=40, width=64):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    owner, instances = torch.zeros(height, width, dtype=torch.int16), Instances((height, width))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
    return {"image": image, "sem_seg": torch.zeros(height, width).long(), "owner": owner, "instances": instances}


# ---- Training


def test_losses_are_weighted(narrow):
    model = build_model(narrow("panoptic_joint"))
    losses = model([sample()])
    assert sorted(losses) == ["loss_attributes", "loss_probability", "loss_semantic"]
    weights = ["MODEL.CASNET.ALPHA", 0.5, "MODEL.CASNET.BETA", 0.25, "MODEL.CASNET.GAMMA", 2.0]
    other = build_model(narrow("panoptic_joint", *weights))
    other.load_state_dict(model.state_dict())
    for name, weight in (("semantic", 0.5), ("attributes", 0.25), ("probability", 2.0)):
        assert other([sample()])[f"loss_{name}"].item() == pytest.approx(weight * losses[f"loss_{name}"].item(), rel=1e-5)


@pytest.mark.parametrize(("row", "warns"), [("panoptic_oracle", True), ("panoptic_joint", False)])
def test_training_for_a_mode_of_inference_is_warned_of(narrow, caplog, monkeypatch, row, warns):
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # said once in a process
    model = build_model(narrow(row))
    with torch.no_grad():
        model([sample()])
    assert not caplog.records, "a validation loss is no training"
    model([sample()]), model([sample()])
    said = [r.getMessage() for r in caplog.records if "'oracle' differs from 'joint' at inference only" in r.getMessage()]
    assert len(said) == warns and all("--eval-only MODEL.WEIGHTS" in message for message in said)


def test_targets_of_a_batch_are_padded(narrow):
    model = build_model(narrow("panoptic_joint"))
    targets, labels = model.targets([sample(), without_instances()])
    assert labels.shape == (2, 64, 96) and targets.things.shape == (2, 16, 24)
    assert (labels[0, 60:] == IGNORED).all() and (labels[1, :, 64:] == IGNORED).all()
    assert targets.things[0].sum() == 6 * 7 + 4 * 7 and not targets.things[1].any()
    assert not targets.counted[0, 13:].any() and not targets.counted[1, 10:].any() and targets.counted[1, :10, :16].all()
    assert targets.central[0].any(dim=(1, 2)).nonzero().flatten().tolist() == [2, 4]
    assert targets.distances[0, :, 0, 0].tolist() == [0.5, 0.5, 7.0, 5.5]


def test_without_instances_every_weight_is_connected(narrow):
    model = build_model(narrow("panoptic_joint"))
    losses = model([without_instances()])
    assert losses["loss_attributes"].item() == 0 and losses["loss_probability"].item() > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_untrained_heads_expect_few_seeds(narrow):
    model = build_model(narrow("panoptic_joint"))
    with torch.no_grad():
        output = model.eval()([sample()])[0]
    assert len(output["instances"]) == 0
    assert model.heads["probability"][3].bias.sigmoid().mean().item() == pytest.approx(0.01)


def test_training_needs_the_mapper(narrow):
    broken = sample()
    del broken["owner"]
    with pytest.raises(DataError, match="INPUT.MAPPER to CASNetMapper"):
        build_model(narrow("panoptic_joint"))([broken])


def test_a_backbone_that_asks_for_no_padding(narrow):
    """The maps of a plain ResNet fit the grid of the targets, also for odd sides."""
    opts = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    model = build_model(narrow("panoptic_joint_R_50_FPN", *opts))
    assert model.backbone.size_divisibility == 0
    assert all(torch.isfinite(loss) for loss in model([sample(61, 91)]).values())
    output = predict(model.eval(), [{"image": sample(61, 91)["image"], "height": 61, "width": 91}])[0]
    assert output["sem_seg"].shape == (19, 61, 91) and output["common_attributes"]["distances"].shape == (4, 16, 24)


@pytest.mark.slow
def test_an_image_is_learned_by_heart(shapes_root, narrow):
    """After enough steps on one scene its instances come out again."""
    torch.manual_seed(0)
    opts = ["MODEL.CASNET.HRNET_WIDTH", 16, "INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", False]
    cfg = narrow("shapes_instance_joint", *opts, "INPUT.MIN_SIZE_TRAIN", (128, 128))
    record = DatasetCatalog.get("shapes_cityscapes_instance_train")[0]
    batch, model = [build_mapper(cfg, is_train=True)(record)], build_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=250)
    for _ in range(250):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        output = model.eval()([{"image": batch[0]["image"], "height": 128, "width": 160}])[0]["instances"]
    owner = batch[0]["owner"]
    found = 0
    for i in range(len(batch[0]["instances"])):
        mask = owner == i + 1
        ious = (output.pred_masks & mask).sum(dim=(1, 2)) / (output.pred_masks | mask).sum(dim=(1, 2))
        found += int((ious > 0.5).any())
    assert found >= len(batch[0]["instances"]) - 1 > 1


# ---- Inference


class Blobs(nn.Module):
    """In place of a head: large spots of random values, whatever the input."""

    def __init__(self, out_channels, mean, deviation):
        super().__init__()
        self.out_channels, self.mean, self.deviation = out_channels, mean, deviation

    def forward(self, x):
        values = torch.randn(1, self.out_channels, 5, 7, generator=torch.Generator().manual_seed(self.out_channels))
        return F.interpolate(values * self.deviation + self.mean, x.shape[-2:], mode="bilinear").expand(len(x), -1, -1, -1)


def talkative(cfg):
    """A model whose heads have something to say: seeds of all classes, boxes of some cells, varied labels."""
    model = build_model(cfg)
    for name, mean, deviation in (("semantic", 0.0, 3.0), ("attributes", 2.0, 2.0), ("probability", -1.0, 3.0)):
        model.heads[name] = Blobs(model.heads[name].out_channels, mean, deviation)
    return model.eval()


def predict(model, batch):
    with torch.no_grad():
        return model(batch)


@pytest.mark.parametrize("height, width", [(60, 90), (33, 70), (64, 96), (200, 31)])
def test_outputs_have_the_size_asked_for(height, width, narrow):
    model = talkative(narrow("panoptic_joint"))
    inputs = {"image": sample()["image"], "height": height, "width": width}
    output = predict(model, [inputs])[0]
    instances, (segments, infos) = output["instances"], output["panoptic_seg"]
    assert output["sem_seg"].shape == (19, height, width) and segments.shape == (height, width)
    assert len(instances) > 3 and instances.pred_masks.shape == (len(instances), height, width)
    attributes = output["common_attributes"]
    assert attributes["grid_size"] == (15, 22.5) and attributes["distances"].shape == (4, 16, 24)
    assert (attributes["distances"] > 0).all()

    labels = output["sem_seg"].argmax(dim=0)
    seeded = [11 + c for c in attributes["seeds"].classes.unique().tolist()]
    for pixel_label in labels.unique().tolist():
        of_label = labels == pixel_label
        if pixel_label >= 11 and pixel_label in seeded:  # no holes
            assert torch.equal(instances.pred_masks[instances.pred_classes == pixel_label - 11].sum(dim=0), of_label.long())
        elif pixel_label >= 11:
            assert not segments[of_label].any()
        else:
            (found,) = segments[of_label].unique().tolist()
            assert {info["id"]: info for info in infos}[found] == {
                "id": found,
                "isthing": False,
                "category_id": pixel_label,
                "area": int(of_label.sum()),
            }
    assert set(segments.unique().tolist()) - {0} == {info["id"] for info in infos}


@pytest.mark.parametrize("size", [(60, 90), (120, 180)])
def test_the_padding_is_cut_off(size, narrow):
    model = talkative(narrow("panoptic_joint"))
    output = predict(model, [{"image": sample()["image"], "height": size[0], "width": size[1]}])[0]
    logits = model.heads["semantic"](torch.zeros(1, 1, 16, 24))
    pixels = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[:, :, :60, :90]
    expected = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(output["sem_seg"], expected)
    distances = F.softplus(model.heads["attributes"](torch.zeros(1, 1, 16, 24)))[0]
    torch.testing.assert_close(output["common_attributes"]["distances"], distances)


def test_images_of_a_batch_do_not_touch_each_other(narrow):
    """Images that are padded alike; those of unlike sizes see different padding, as in every padded batch."""
    model = build_model(narrow("panoptic_joint")).eval()
    first, second = ({"image": sample(seed=seed)["image"], "height": 60, "width": 90} for seed in (0, 1))
    alone, (other, together) = predict(model, [first])[0], predict(model, [second, first])
    torch.testing.assert_close(alone["sem_seg"], together["sem_seg"], rtol=1e-4, atol=1e-5)
    assert (other["sem_seg"] - together["sem_seg"]).abs().max() > 1e-3
    distances = [output["common_attributes"]["distances"] for output in (alone, together)]
    torch.testing.assert_close(*distances, rtol=1e-4, atol=1e-5)


def test_instance_models_give_instances_only(narrow):
    model = talkative(narrow("instance_joint"))
    output = predict(model, [{"image": sample()["image"], "height": 60, "width": 90}])[0]
    assert sorted(output) == ["common_attributes", "instances"] and len(output["instances"])
    assert model.heads["semantic"].out_channels == 9 and model.thing_labels == list(range(8))


def test_semantic_score_multiplies_by_the_mean_probability(narrow):
    plain, scored = (talkative(narrow("panoptic_joint", "MODEL.CASNET.SEMANTIC_SCORE", on)) for on in (False, True))
    inputs = [{"image": sample()["image"], "height": 60, "width": 90}]
    before, after = predict(plain, inputs)[0], predict(scored, inputs)[0]["instances"]
    probability = before["sem_seg"].softmax(dim=0).amax(dim=0)
    for k, mask in enumerate(before["instances"].pred_masks):
        expected = before["instances"].scores[k] * probability[mask].mean()
        assert after.scores[k].item() == pytest.approx(expected.item(), rel=1e-4)


# ---- Modes


def test_oracle_uses_the_given_labels(narrow):
    model = talkative(narrow("panoptic_oracle"))
    given = sample()
    output = predict(model, [given])[0]
    assert output["sem_seg"].shape == (19, 60, 90)
    assert torch.equal(output["sem_seg"].sum(dim=0), (given["sem_seg"] != IGNORED).float())
    assert torch.equal(output["sem_seg"].argmax(dim=0)[:56], given["sem_seg"][:56])
    seeds = output["common_attributes"]["seeds"].classes.tolist()
    assert 2 in seeds and 4 in seeds
    assert torch.equal(output["instances"].pred_masks.any(dim=0), (given["sem_seg"] == 13) | (given["sem_seg"] == 15))
    assert not output["panoptic_seg"][0][56:].any()  # void


def test_oracle_with_true_attributes_is_the_upper_bound(shapes_root, narrow):
    """With the targets in place of the heads the oracle finds what is there, but for what the grid cannot say."""
    opts = ["DATASETS.TRAIN", ("shapes_train_panoptic",), "MODEL.CASNET.THING_LABELS", list(range(8))]
    opts += ["INPUT.MIN_SIZE_TRAIN", (128, 128), "INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", False]
    opts += ["MODEL.CASNET.OUTPUT_STRIDE", 2, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 11]
    cfg = narrow("shapes_panoptic_oracle", *opts)
    model = build_model(cfg).eval()
    found = total = 0
    for record in DatasetCatalog.get("shapes_val_panoptic")[:6]:
        truth, given = build_mapper(cfg, is_train=True)(record), build_mapper(cfg, is_train=False)(record)
        targets, _ = model.targets([truth])
        output = model.inference(given["sem_seg"], targets.distances[0], targets.central[0].float(), (128, 160))
        masks = output["instances"].pred_masks
        for i in range(len(truth["instances"])):
            mask = truth["owner"] == i + 1
            ious = (masks & mask).sum(dim=(1, 2)) / (masks | mask).sum(dim=(1, 2))
            found, total = found + int((ious > 0.85).any()), total + 1
    assert total > 20 and found > 0.8 * total


def test_oracle_without_labels_says_so(narrow):
    model = build_model(narrow("panoptic_oracle")).eval()
    with pytest.raises(ConfigError, match="oracle.*expected the field 'sem_seg'.*found only image, height, width"):
        predict(model, [{"image": sample()["image"], "height": 60, "width": 90}])
    with pytest.raises(DataError, match=r"\(60, 90\).*the output \(120, 180\)"):
        predict(model, [sample() | {"height": 120, "width": 180}])


def semantic_weights(cfg, path):
    """Save the weights of a semantic network that sees things, as training does. Returns the network."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    torch.manual_seed(0)
    network = build_model(cfg)
    network.sem_seg_head.layers[3].weight.data.normal_(std=1.0)
    network.sem_seg_head.layers[3].bias.data[11:] = 9.0
    Checkpointer(network, str(path.parent)).save(path.stem)
    return network.eval()


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_separated_takes_the_second_networks_map(task, narrow, tmp_path):
    path = tmp_path / "semantic.pth"
    network = semantic_weights(narrow("semantic_hrnet_w48"), path)
    model = talkative(narrow(f"{task}_separated", "MODEL.CASNET.SEMANTIC_WEIGHTS", str(path)))
    inputs = [{"image": sample()["image"], "height": 60, "width": 90}]
    expected, output = predict(network, inputs)[0]["sem_seg"], predict(model, inputs)[0]
    labels, seeded = expected.argmax(dim=0), output["common_attributes"]["seeds"].classes + 11
    things = torch.isin(labels, seeded)
    assert things.any() and torch.equal(output["instances"].pred_masks.any(dim=0), things)
    assert task == "instance" or torch.equal(output["sem_seg"], expected)


def test_the_second_network_is_no_part_of_the_model(narrow, tmp_path):
    path = tmp_path / "semantic.pth"
    semantic_weights(narrow("semantic_hrnet_w48"), path)
    separated = build_model(narrow("panoptic_separated", "MODEL.CASNET.SEMANTIC_WEIGHTS", str(path)))
    joint = build_model(narrow("panoptic_joint"))
    assert separated.state_dict().keys() == joint.state_dict().keys()
    joint.load_state_dict(separated.state_dict())
    assert not any(p.requires_grad for p in separated.semantic_network.network.parameters())
    before = copy.deepcopy(separated.semantic_network.network.state_dict())
    separated.train()
    mine, other = separated([sample()]), joint([sample()])
    for name in mine:
        assert mine[name].item() == pytest.approx(other[name].item())
    predict(separated.eval(), [{"image": sample()["image"], "height": 60, "width": 90}])
    after = separated.semantic_network.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_second_network_has_a_config_of_its_own(narrow, tmp_path):
    """A ResNet for the attributes, an HRNet that enlarges bilinearly for the semantic map."""
    semantic_cfg = narrow("semantic_hrnet_w48", "MODEL.CASNET.HRNET_UPSAMPLE", "bilinear", "MODEL.CASNET.OUTPUT_STRIDE", 8)
    (tmp_path / "semantic.yaml").write_text(semantic_cfg.dump())
    network = semantic_weights(semantic_cfg, tmp_path / "semantic.pth")
    opts = ["MODEL.CASNET.MODE", "separated", "MODEL.CASNET.SEMANTIC_WEIGHTS", str(tmp_path / "semantic.pth")]
    opts += ["MODEL.CASNET.SEMANTIC_CONFIG", str(tmp_path / "semantic.yaml")]
    model = build_model(narrow("panoptic_joint_R_50_FPN", *opts)).eval()
    inputs = [{"image": sample()["image"], "height": 60, "width": 90}]
    assert torch.equal(predict(model, inputs)[0]["sem_seg"], predict(network, inputs)[0]["sem_seg"])
    assert {m.mode for m in model.semantic_network.network.backbone.modules() if isinstance(m, nn.Upsample)} == {"bilinear"}
    semantic_cfg.defrost()
    semantic_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    (tmp_path / "semantic.yaml").write_text(semantic_cfg.dump())
    with pytest.raises(ConfigError, match="SEMANTIC_CONFIG '.*semantic.yaml' has 5 classes.*expected 19"):
        build_model(narrow("panoptic_joint_R_50_FPN", *opts))


def test_separated_reads_the_official_segmentation_weights(narrow, official, tmp_path):
    """Their head's first convolution has a bias: the result is as if it were there."""
    full = ["MODEL.CASNET.HRNET_MODULES", [1, 4, 3], "MODEL.CASNET.HRNET_BLOCKS", 4]
    shapes = official.hrnet(4) | official.last_layer(4, 19)
    generator = torch.Generator().manual_seed(0)
    state = {f"model.{name}": torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "official.pth")
    opts = [*full, "MODEL.CASNET.SEMANTIC_WEIGHTS", str(tmp_path / "official.pth")]
    model = build_model(narrow("panoptic_separated", *opts))
    network = model.semantic_network.network
    modes = [{m.mode for m in net.backbone.modules() if isinstance(m, nn.Upsample)} for net in (model, network)]
    assert modes == [{"nearest"}, {"bilinear"}]
    for name, value in network.backbone.net.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"].to(value.dtype)), name

    head = nn.Sequential(nn.Conv2d(60, 60, 1), nn.BatchNorm2d(60), nn.ReLU(), nn.Conv2d(60, 19, 1)).eval()
    head.load_state_dict({name[17:]: value for name, value in state.items() if name.startswith("model.last_layer.")})
    x = torch.rand(1, 60, 3, 4)
    torch.testing.assert_close(network.sem_seg_head.layers(x), head(x))

    del state["model.last_layer.3.bias"]
    torch.save(state, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="SEMANTIC_WEIGHTS.*19 classes: last_layer.3.bias is missing"):
        build_model(narrow("panoptic_separated", *opts))


@pytest.mark.parametrize("content", [None, "directory", "joint"])
def test_separated_without_fitting_weights_says_so(content, narrow, tmp_path):
    path = tmp_path / "semantic.pth"
    if content == "joint":  # the weights of the wrong model
        Checkpointer(build_model(narrow("panoptic_joint")), str(tmp_path)).save("semantic")
    elif content:
        path.mkdir()
    with pytest.raises(CheckpointError, match="MODEL.CASNET.SEMANTIC_WEIGHTS"):
        build_model(narrow("panoptic_separated", "MODEL.CASNET.SEMANTIC_WEIGHTS", str(path)))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("TASK", "semantic", "expected one of panoptic, instance"),
        ("MODE", "seperated", "expected one of joint, separated, oracle"),
        ("THING_LABELS", [11, 11, 13, 14, 15, 16, 17, 18], "expected 8 different numbers"),
        ("THING_LABELS", [11, 12, 13], "expected 8 different numbers"),
        ("THING_LABELS", [12, 13, 14, 15, 16, 17, 18, 19], "from 0 to 18"),
    ],
)
def test_wrong_keys_are_named(key, value, expected, narrow):
    with pytest.raises(ConfigError, match=f"MODEL.CASNET.{key} is .*{expected}"):
        build_model(narrow("panoptic_joint", f"MODEL.CASNET.{key}", value))


def test_mixed_precision(narrow):
    model = build_model(narrow("panoptic_joint"))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([sample(), without_instances()])
        sum(losses.values()).backward()
        output = predict(model.eval(), [{"image": sample()["image"], "height": 60, "width": 90}])[0]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert output["common_attributes"]["distances"].isfinite().all()


# ---- Several processes


@pytest.mark.parametrize("processes, device, on", [(1, "cuda", True), (2, "cpu", True), (2, "cuda", False), (2, "cuda", True)])
def test_batch_norm_is_synchronized_where_it_can_be(processes, device, on, narrow, monkeypatch):
    cfg = narrow("panoptic_joint", "MODEL.CASNET.SYNC_BN", on)
    cfg.MODEL.DEVICE = device
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    arguments = meta_arch.CASNet.from_config(cfg)
    kinds = {type(m) for part in ("backbone", "heads") for m in arguments[part].modules() if "BatchNorm" in type(m).__name__}
    wanted = nn.SyncBatchNorm if (processes, device, on) == (2, "cuda", True) else nn.BatchNorm2d
    assert kinds == {wanted}
    head = nn.Sequential(nn.BatchNorm2d(3))
    torch.nn.init.normal_(head[0].weight)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    after = synchronized(head, cfg).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


# ---- Weights of every row


def pixel_head(channels, out):
    return channels**2 + 2 * channels + channels * out + out


def hrnet_row(width, heads):
    return {18: 9_562_260, 32: 29_305_536, 48: 65_325_120}[width] + sum(pixel_head(15 * width, out) for out in heads)


def resnet_row(convolutions):
    """The convolutions of a ResNet (its norms are frozen), FPN's to 256 channels, heads on the 1024 of four levels."""
    lateral = 256 * (256 + 512 + 1024 + 2048) + 4 * 256
    return convolutions + lateral + 4 * (9 * 256 * 256 + 256) + sum(pixel_head(1024, out) for out in (19, 4, 8))


@pytest.mark.parametrize(
    "row, expected",
    [
        ("panoptic_joint", hrnet_row(48, [19, 4, 8])),
        ("instance_joint", hrnet_row(48, [9, 4, 8])),
        ("semantic_hrnet_w48", hrnet_row(48, [19])),
        ("panoptic_joint_hrnet_w32", hrnet_row(32, [19, 4, 8])),
        ("panoptic_joint_hrnet_w18", hrnet_row(18, [19, 4, 8])),
        # torchvision's ResNets without the classifier and the norms
        ("panoptic_joint_R_50_FPN", resnet_row(25_557_032 - 2_049_000 - 53_120)),
        ("panoptic_joint_R_101_FPN", resnet_row(44_549_160 - 2_049_000 - 105_344)),
    ],
)
def test_weights_of_the_rows(row, expected, narrow):
    from projects import load_config

    cfg = load_config(str(REPO / f"configs/casnet/{row}.yaml"), ["MODEL.DEVICE", "meta", "MODEL.CASNET.HRNET_WEIGHTS", ""])
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == expected


# ---- As applications call it


@pytest.mark.parametrize("row", ROWS)
def test_default_predictor(row, narrow, tmp_path):
    opts = []
    image = np.random.RandomState(0).randint(0, 255, (50, 70, 3), dtype=np.uint8)
    if row.endswith("separated"):
        with pytest.raises(CheckpointError, match=r"CASNET.SEMANTIC_WEIGHTS, found no file.*the \*semantic_hrnet\* config"):
            DefaultPredictor(narrow(row))
        semantic_weights(narrow(row), tmp_path / "semantic.pth")
        opts = ["MODEL.CASNET.SEMANTIC_WEIGHTS", str(tmp_path / "semantic.pth")]
    predictor = DefaultPredictor(narrow(row, *opts))
    if row.endswith("oracle"):
        with pytest.raises(ConfigError, match="expected the field 'sem_seg'"):
            predictor(image)
        return
    output = predictor(image)
    if "semantic" not in row:
        assert output["instances"].image_size == (50, 70)
    assert "instance" in row or output["sem_seg"].shape == (19, 50, 70)
    assert predictor.metadata.name == narrow(row).DATASETS.TEST[0]
    assert MetadataCatalog.get(predictor.metadata.name).evaluator_type.startswith("cityscapes")
