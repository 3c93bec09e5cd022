"""The generator: Mask R-CNN, which on demand also returns samples for the discriminators (section 3.2).

Nothing of the discriminators is part of it: its weights are Mask R-CNN's, by name and shape, and so is its inference.
"""

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.events import get_event_storage


@META_ARCH_REGISTRY.register()
class GANMaskRCNN(GeneralizedRCNN):
    """GeneralizedRCNN for GANMaskROIHeads."""

    def forward(self, batched_inputs: list[dict], return_samples: bool = False):
        """As GeneralizedRCNN's: the losses by name in training, the predictions at inference.

        Args:
            batched_inputs: as GeneralizedRCNN's, with "instances" in training.
            return_samples: in training only.

        Returns:
            With ``return_samples``: (losses, :class:`.samples.Samples`); the losses are those that come without it.
        """
        if not return_samples:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [sample["instances"].to(self.device) for sample in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, proposal_losses = self.proposal_generator(images, features, targets)
        losses, samples = self.roi_heads.forward_with_samples(features, proposals, targets)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return losses | proposal_losses, samples
