"""Gradient descent in as few launches as the device allows."""

from collections.abc import Callable

import torch

WARM_UPS = 3  # steps before a CUDA graph is captured: what is compiled, tuned or allocated once is then done
AVERAGE = 0.999  # share of the running mean that a step keeps, if nothing else is said


class Descent:
    """AdamW with the gradient's norm clipped to 1, and a running mean of the weights."""

    def __init__(
        self, module: torch.nn.Module, betas: tuple[float, float], decay: float = 0.0, average: float = AVERAGE
    ) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        device = self.parameters[0].device
        self.on_gpu = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=betas, weight_decay=decay, fused=True, capturable=self.on_gpu
        )
        self.kept = average
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def steps(self, loss_of: Callable[[], torch.Tensor]) -> Callable[[float], torch.Tensor]:
        """Return a function that takes one step at a learning rate and returns the loss, still on the device.

        loss_of draws its own random batch. On a GPU its steps become one CUDA graph, because thousands of small
        kernels would otherwise wait for Python; so it must not read a tensor on the host.
        """
        step = _Graph(lambda: self._step(loss_of)) if self.on_gpu else lambda: self._step(loss_of)

        def take_step(rate: float) -> torch.Tensor:
            self.rate.fill_(rate)
            return step()

        return take_step

    def _step(self, loss_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.kept)
        return loss.detach()

    @torch.no_grad()
    def settle(self) -> None:
        """Put the running mean of the weights in their place."""
        torch._foreach_copy_(self.parameters, self.average)


class _Graph:
    """Runs a function as it is WARM_UPS times, then captures it once and replays that."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work = work
        self.calls = 0
        self.side = torch.cuda.Stream()  # capture needs the warm-ups on another stream than the default one
        self.graph = torch.cuda.CUDAGraph()
        self.result = torch.empty(0)

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        if self.calls <= WARM_UPS:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.result = self.work()
            torch.cuda.current_stream().wait_stream(self.side)
            return self.result
        if self.calls == WARM_UPS + 1:
            with torch.cuda.graph(self.graph):
                self.result = self.work()
        self.graph.replay()
        return self.result
