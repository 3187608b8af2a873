"""GLM-4.1V, 4.5V, 4.6V and GA: patches of any grid merged 2 x 2, M-RoPE, a GLM text model."""

from foveate.families.family import register_family
from foveate.families.mrope import MRope


@register_family("glm4v", "glm4v_moe", "glm46v", "glmga")
class Glm4V(MRope):
    """`Glm4v`, `Glm4vMoe` and `Glm46VForConditionalGeneration`, and their models."""

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Frames of a video stand on the image's token; images and videos cannot be mixed."""
        token = self.config.image_token_id
        return {"image": token, "video": token}
