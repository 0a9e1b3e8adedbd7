"""What USB expects of a net."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class USBNet(nn.Module):
    """Features, then a linear head; the calling convention of USB's nets.

    A subclass sets ``num_features`` and ``classifier`` and defines ``extract`` (images to a (N, F, h, w) map).
    """

    num_features: int
    classifier: nn.Module

    def extract(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) images to (N, num_features, h, w) feature maps."""
        raise NotImplementedError

    def forward(self, x: Tensor, only_fc: bool = False, only_feat: bool = False, **_: Any) -> Any:
        """``{"logits": (N, classes), "feat": (N, num_features)}``; or one of the two parts.

        Args:
            x: images, or features when ``only_fc``.
        """
        if only_fc:
            return self.classifier(x)
        feat = self.extract(x).mean((2, 3))
        return feat if only_feat else {"logits": self.classifier(feat), "feat": feat}

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters without weight decay: biases and batch-norm parameters."""
        return [n for n, p in self.named_parameters() if p.ndim == 1]

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """Layer groups for USB's layer-wise learning-rate decay."""
        return {"stem": rf"^{prefix}blocks\.0", "blocks": rf"^{prefix}blocks\.(\d+)"}
