"""Config keys of DSG. Their defaults are the paper's DSG: mRPN, F_M, SgRA_B and F_B (section 4.2, last sentence)."""

from detectron2.config import CfgNode


def add_dsg_config(cfg: CfgNode) -> None:
    """Add the keys under MODEL.DSG. mRPN itself is chosen by MODEL.PROPOSAL_GENERATOR.NAME "MaskRPN"."""
    cfg.MODEL.DSG = type(cfg)()  # merging wants one class of nodes throughout
    # F_M of Table 1: add the MPN's features to the input of the mask head (section 3.3).
    cfg.MODEL.DSG.FUSION_MASK = True
    # SgRA_B: the box head pools with SgRoIAlign, guided by the MPN's probabilities P (section 3.4, Eq. 2).
    cfg.MODEL.DSG.SGRA_BOX = True
    # F_B: add the MPN's features to the input of the box head (section 3.3).
    cfg.MODEL.DSG.FUSION_BOX = True
    # SgRA_M: the mask head pools with SgRoIAlign too; the paper leaves it off, since it costs mask AP (Table 1).
    cfg.MODEL.DSG.SGRA_MASK = False
    # Kernel of the fusing convolutions: 3 gives the model sizes of Table 1, 1 is what the text of section 3.3 says.
    cfg.MODEL.DSG.FUSION_KERNEL = 3
    # Cut the gradient from the losses of the guided heads through P into the MPN; the paper lets it flow.
    cfg.MODEL.DSG.DETACH_PROBS = False
    # What the MPN computes in at inference: "float32", or "bfloat16", which halves the memory of its features, and its time
    # where the processor computes in it.
    cfg.MODEL.DSG.MPN_DTYPE_TEST = "float32"
    # Whose F_ (and P, for SGRA_MASK) a detection's mask sees at inference: "proposal", that of the proposal it came from, which
    # lies on another box (section 3.3), or "detection": the MPN runs once more, on the detections (ours).
    cfg.MODEL.DSG.MASK_FEATURES_TEST = "proposal"

    # Cascade DSG and HTC (ROI_HEADS.NAME "CascadeMaskROIHeads", "HTCROIHeads", "CascadeDSGROIHeads"), section 3.5.
    # A stage's mask head runs on the boxes that the stage predicts (B^t of Eq. 3; HTC's interleaved execution).
    cfg.MODEL.DSG.INTERLEAVED = False
    # HTC's mask information flow: a stage's mask head also sees what the earlier ones make of its boxes.
    cfg.MODEL.DSG.MASK_FLOW = False
    # HTC's semantic branch (META_ARCHITECTURE "DSGRCNN"), with the keys of MODEL.SEM_SEG_HEAD; learns from `sem_seg`.
    cfg.MODEL.DSG.SEMANTIC = False
    # Weight of each stage's losses of boxes and masks, as in the paper's code base.
    cfg.MODEL.DSG.STAGE_WEIGHTS = [1.0, 0.5, 0.25]
