"""One picture: an unmodified pipeline call on a request's view, watched from outside.

Steps are counted on the request's own scheduler (several pipelines have no step callback). Runs in a rider's thread.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from services.errors import InvalidRequest
from services.sampler.faults import is_memory_full
from services.sampler.gates import Gate
from services.sampler.model import AttachedModel, is_encoder
from services.sampler.philox import PhiloxGenerator, philox_generator
from services.sampler.pixels import OnHost, Pixels, drawn
from services.sampler.previews import denoised_latents, preview_image
from services.sampler.requests import ImageRequest, Phase, Progress, Rng
from services.sampler.work import kind_of
from services.sampler.workspace import MemoryMeter, ShortageMeter, Workspace

Emit = Callable[[Progress], None]
EmitPreview = Callable[[int, Image.Image], None]


class Drawing:
    """Draws picture `index` of a resolved request and says how it goes.

    `emit` and `emit_preview` are called in the rider's thread and must not block or raise.
    """

    def __init__(
        self,
        model: AttachedModel,
        workspace: Workspace,
        request: ImageRequest,
        index: int,
        emit: Emit,
        emit_preview: EmitPreview,
    ) -> None:
        self.phase_s: dict[Phase, float] = {}
        self._model = model
        self._workspace = workspace
        self._request = request
        self._traits = model.abilities.traits[request.task]
        self.size_px = self._traits.expected_size(request)  # (width, height); exact as soon as the pipeline says it
        self._kind = kind_of(model.name, request, self.size_px)
        self._meter: MemoryMeter | None = None
        self._shortage = ShortageMeter(workspace.failures)
        self._index = index
        self._emit = emit
        self._emit_preview = emit_preview
        self._phase: Phase | None = None
        self._since = time.monotonic()
        self._previewing = False
        self._sigmas: OnHost | None = None
        self._own_step_count = 0  # of pipelines that leave out the first steps
        self.step, self.step_count = 0, request.step_count

    @torch.inference_mode()
    def draw(self) -> Pixels:
        """Run the pipeline; returns the picture on its way. Raises what the gates raise, and DeviceMemoryFull."""
        traits = self._traits
        try:
            with self._workspace.room(self._kind, traits.size_multiple_px, traits.can_tile) as self._meter:
                picture = self._attempt()
                if picture is None and self._workspace.make_way():
                    if self._meter is not None:
                        self._meter.restart()
                    picture = self._attempt()
                if picture is None:
                    raise self._workspace.too_large(self._kind, traits.size_multiple_px, traits.can_tile)
                return picture
        finally:
            self._enter_phase(None)

    def _attempt(self) -> Pixels | None:
        """The picture, from its beginning; None if memory was short (not raised: a traceback would hold memory)."""
        self.step, self._sigmas, self._own_step_count = 0, None, 0
        self._shortage = ShortageMeter(self._workspace.failures)
        try:
            self._model.bring_pinned()
            request = self._request
            view = self._model.request_view(bool(request.tiled_decode), request.solver, request.schedule, request.task)
            generator = self._generator(view)
            view.scheduler.__dict__["step"] = self._watched(view, view.scheduler.step)
            self._listen(view)
            arguments = self._traits.call_arguments(request)
            picture = drawn(view, arguments | {"generator": generator})
            if isinstance(generator, PhiloxGenerator):
                generator.check()
        except RuntimeError as error:
            if not is_memory_full(error):
                raise
            return None
        else:
            self._shortage.pause()
            return None if self._shortage.was_short else picture
        finally:
            self._model.mend()

    def _generator(self, view: Any) -> torch.Generator:
        """Whatever it imitates, noise is drawn on the CPU: the same seed is the same noise on every device."""
        seed = self._request.seed_of(self._index)
        if self._request.rng is Rng.GPU_PHILOX:
            return philox_generator(view, seed)
        return torch.Generator("cpu").manual_seed(seed)

    def paused(self) -> None:
        """The rider is about to give the baton on."""
        self._shortage.pause()
        if self._meter is not None:
            self._meter.pause()

    def passed(self, gate: Gate, waits: bool) -> None:
        """The rider stands at a gate whose bytes are still being read (`waits`), or passes it."""
        if self._meter is not None and not waits:
            self._meter.resume()
        if gate.component in self._model.convolving and not waits:
            self._shortage.resume()
        if self._previewing:
            return
        phase = Phase.PREPARING if waits or gate.pinned else self._phase_of(gate)
        if waits or phase is not self._phase:
            self._enter_phase(phase)
            self._say(phase)

    def _phase_of(self, gate: Gate) -> Phase:
        if gate.component in self._model.units:
            return Phase.DECODING if self.step else Phase.ENCODING  # of a reference image
        return Phase.ENCODING if is_encoder(gate.component) else Phase.DENOISING

    def _enter_phase(self, phase: Phase | None) -> None:
        now = time.monotonic()
        if self._phase is not None:
            self.phase_s[self._phase] = self.phase_s.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def _say(self, phase: Phase, sigma: float | None = None) -> None:
        if phase is Phase.PREPARING:
            news = Progress(self._index, phase, ready_bytes=self._model.ready_bytes, total_bytes=self._model.size_bytes)
        elif phase is Phase.DENOISING:
            news = Progress(self._index, phase, self.step, self.step_count, sigma)
        else:
            news = Progress(self._index, phase)
        self._emit(news)

    def _listen(self, view: Any) -> None:
        """Hear from the pipeline's own methods what size it draws and how many steps it takes."""
        for name, hear in (("get_timesteps", self._hear_steps), ("prepare_latents", self._hear_size)):
            if hasattr(view, name):
                view.__dict__[name] = heard(getattr(view, name), hear)

    def _hear_steps(self, arguments: Mapping[str, Any], result: Any) -> None:
        """Fewer than asked for, by the strength."""
        if isinstance(result, tuple):
            self.step_count = self._own_step_count = len(result[0])

    def _hear_size(self, arguments: Mapping[str, Any], result: Any) -> None:
        width, height = arguments.get("width"), arguments.get("height")
        if not (isinstance(width, int) and isinstance(height, int)):
            return  # it is the reference image's
        asked = (self._request.width_px or width, self._request.height_px or height)
        if asked != (width, height):
            task = self._request.task.value
            advice = f"{task} by this model draws this image at {width}x{height} only: leave width and height out"
            raise InvalidRequest(("width_px", advice))
        self.size_px = (width, height)

    def _watched(self, view: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's step, counted; the pipeline sees the same signature and the same results."""

        @functools.wraps(step)
        def watched(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **options: Any) -> Any:
            scheduler = view.scheduler
            result = step(model_output, timestep, sample, *args, **options)
            self.step += 1
            # heun: two for each step but the last
            self.step_count = self._own_step_count or len(scheduler.timesteps)
            self._say(Phase.DENOISING, self._sigma_after(scheduler))
            if self._wants_preview():
                self._preview(view, denoised_latents(scheduler, model_output, sample, result))
            return result

        return watched

    def _sigma_after(self, scheduler: Any) -> float | None:
        if self._sigmas is None:
            self._sigmas = OnHost(torch.as_tensor(getattr(scheduler, "sigmas", ())))
        sigmas, at = self._sigmas, getattr(scheduler, "step_index", None)
        if at is None or at >= len(sigmas.tensor) or not sigmas.has_arrived():
            return None
        return float(sigmas.tensor[at])

    def _wants_preview(self) -> bool:
        every = self._request.preview_every
        return every > 0 and self.step % every == 0 and self.step < self.step_count

    def _preview(self, view: Any, latents: torch.Tensor) -> None:
        self._previewing = True
        try:
            self._emit_preview(self.step, preview_image(view, latents, self.size_px, self._request.preview_edge_px))
        finally:
            self._previewing = False


def heard(method: Callable[..., Any], hear: Callable[[Mapping[str, Any], Any], None]) -> Callable[..., Any]:
    """`method`, and `hear` is told its arguments by name and its result."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def told(*args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        hear(signature.bind(*args, **options).arguments, result)
        return result

    return told
