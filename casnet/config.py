"""Config keys of CASNet. The number of thing classes is MODEL.ROI_HEADS.NUM_CLASSES, that of all semantic classes, things
included, MODEL.SEM_SEG_HEAD.NUM_CLASSES."""

from detectron2.config import CfgNode


def add_casnet_config(cfg: CfgNode) -> None:
    """Add the node MODEL.CASNET to ``cfg``."""
    cfg.MODEL.CASNET = type(cfg)()  # merging wants one class of nodes throughout
    # "panoptic": the semantic head tells all classes apart; "instance": the things and one background (section III.A).
    cfg.MODEL.CASNET.TASK = "panoptic"
    # Where the semantic map comes from at inference: "joint", "separated" (section IV) or "oracle" (Tables III and IV).
    cfg.MODEL.CASNET.MODE = "joint"
    # Mode "separated": the weights of the semantic network, of a config such as semantic_hrnet_w48.yaml or official ones.
    cfg.MODEL.CASNET.SEMANTIC_WEIGHTS = ""
    # Mode "separated": the config file of the second network; "": it has this model's backbone and OUTPUT_STRIDE.
    cfg.MODEL.CASNET.SEMANTIC_CONFIG = ""
    # For each thing class its number among the semantic classes (the train ids of Cityscapes' eight: 11 to 18).
    cfg.MODEL.CASNET.THING_LABELS = [11, 12, 13, 14, 15, 16, 17, 18]
    # Image pixels per cell of the grid that the heads predict on (section III.A): 2, 4 or 8.
    cfg.MODEL.CASNET.OUTPUT_STRIDE = 4
    # HRNet (section III.A): W, the channels of the branch of 1/4; the others have 2W, 4W and 8W.
    cfg.MODEL.CASNET.HRNET_WIDTH = 48
    # HRNet: modules of the stages 2, 3 and 4.
    cfg.MODEL.CASNET.HRNET_MODULES = [1, 4, 3]
    # HRNet: residual blocks of stage 1, and of every branch of a module.
    cfg.MODEL.CASNET.HRNET_BLOCKS = 4
    # HRNet: how its fusions enlarge, "nearest" (ImageNet weights) or "bilinear" (the official segmentation weights; a second
    # network that has these is always "bilinear").
    cfg.MODEL.CASNET.HRNET_UPSAMPLE = "nearest"
    # HRNet's weights where MODEL.WEIGHTS is empty: "timm" fetches ImageNet ones; a file in the official format; "" none.
    cfg.MODEL.CASNET.HRNET_WEIGHTS = ""
    # Batch norm of HRNet and heads over the images of all processes, where there are several and they have GPUs.
    cfg.MODEL.CASNET.SYNC_BN = True
    # Box probability (section III.B): sides of the central area whose pixels have target 1, relative to the box's.
    cfg.MODEL.CASNET.CENTRAL_AREA = 0.1
    # Box probability: w_n of equation 3 where the target is 1; elsewhere it is 1.
    cfg.MODEL.CASNET.POSITIVE_WEIGHT = 20.0
    # Weight of the semantic loss, the alpha of equation 4.
    cfg.MODEL.CASNET.ALPHA = 1.0
    # Weight of the loss of the common attributes, the beta of equation 4.
    cfg.MODEL.CASNET.BETA = 1.0
    # Weight of the loss of the box probability, the gamma of equation 4.
    cfg.MODEL.CASNET.GAMMA = 1.0
    # Seeds (section III.C): positions with a higher box probability than this.
    cfg.MODEL.CASNET.SEED_THRESHOLD = 0.5
    # Seeds: of two whose boxes have a higher IoU than this the less probable one is dropped.
    cfg.MODEL.CASNET.NMS_THRESHOLD = 0.5
    # Seeds: how many positions enter the NMS, the most probable ones; TEST.DETECTIONS_PER_IMAGE seeds at most leave it.
    cfg.MODEL.CASNET.PRE_NMS_TOPK = 10000
    # Votes (section III.C): IoUs that are less than this below the best are "approximate the same"; then the centres decide.
    cfg.MODEL.CASNET.TIE_MARGIN = 0.02
    # Votes: pairs of a pixel and a seed that are looked at at once; this bounds the memory.
    cfg.MODEL.CASNET.MAX_PAIRS = 4000000
    # Multiply an instance's score, the probability of its seed, by the mean semantic probability of its pixels (in mode
    # "oracle" there are none, and the score stays).
    cfg.MODEL.CASNET.SEMANTIC_SCORE = False
