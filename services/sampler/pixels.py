"""Numbers that come back from the device, without anybody waiting for it while others could use it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from services.sampler.meter import has_passed


class OnHost:
    """A tensor's way to host memory, begun under the baton; `tensor` is the host's, filled once it has arrived."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self.tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            # Blocking: who waits leaves its core to others.
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def has_arrived(self) -> bool:
        return self._arrived is None or has_passed(self._arrived)

    def wait(self) -> torch.Tensor:
        """The host's tensor; not under the baton."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self.tensor


class Pixels:
    """A picture on its way from the device."""

    def __init__(self, picture: Image.Image | OnHost) -> None:
        self._picture = picture

    @torch.inference_mode()
    def image(self) -> Image.Image:
        """The picture. Waits for the device, and computes: not under the baton."""
        if isinstance(self._picture, Image.Image):
            return self._picture
        pixels = VaeImageProcessor.pt_to_numpy(self._picture.wait())
        picture: Image.Image = VaeImageProcessor.numpy_to_pil(pixels)[0]
        return picture


def drawn(view: Any, arguments: dict[str, Any]) -> Pixels:
    """The first picture of a pipeline call.

    What diffusers' processor does to make a PIL image out of the autoencoder's tensor is done later: it waits for the
    device, and under the baton nobody else could launch anything meanwhile.
    """
    processor = getattr(view, "image_processor", None)
    if type(processor) is not VaeImageProcessor:
        return Pixels(view(**arguments, output_type="pil").images[0])
    return Pixels(OnHost(view(**arguments, output_type="pt").images[:1]))
