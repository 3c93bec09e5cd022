"""DSG's meta-architecture: GeneralizedRCNN that hands the MPN on to the ROI heads, for boxes that come without proposals."""

import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Instances


@META_ARCH_REGISTRY.register()
class DSGRCNN(GeneralizedRCNN):
    """GeneralizedRCNN for :class:`dsg.mask_rpn.MaskRPN` and :class:`dsg.roi_heads.DSGROIHeads`."""

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):
        """As GeneralizedRCNN's: with ``detected_instances`` (test-time augmentation) only the masks of their boxes.

        The pyramid is laid out channels_last once, since many poolings read from it.
        """
        assert not self.training
        images = self.preprocess_image(batched_inputs)
        features = {
            name: level.contiguous(memory_format=torch.channels_last) for name, level in self.backbone(images.tensor).items()
        }
        if detected_instances is None:
            proposals, _ = self.proposal_generator(images, features)
            results, _ = self.roi_heads(images, features, proposals)
        else:
            instances = [x.to(self.device) for x in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, instances, self.proposal_generator.mpn)
        return self._postprocess(results, batched_inputs, images.image_sizes) if do_postprocess else results
