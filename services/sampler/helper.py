"""The process that compiles ahead, and the thread that waits for it, so that no rider holds the baton meanwhile.

The process is started when there is work, serves one job after the other, and is ended when none came for a while, for
it holds memory on the device. If it fails or dies the sampler compiles in its own process: slower for all, same pixels.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from services.sampler.job import Job
from services.sampler.signatures import Signature

PROGRAM = ("-m", "services.sampler.compile_worker")
# A new size needs several programs, one right after the other.
LINGER_S = 20.0
# torch and diffusers are imported, a model is built from its config, kernels are compiled: minutes on a poor machine.
JOB_LIMIT_S = 600.0

log = structlog.get_logger()


class Helper:
    """Runs jobs one by one. May be used from any thread."""

    def __init__(self, cache: Path, program: Sequence[str] = PROGRAM) -> None:
        self._cache = cache
        self._command = [sys.executable, *program, str(cache)]
        self._jobs: queue.SimpleQueue[tuple[Signature, Job] | None] = queue.SimpleQueue()
        self._waiting: dict[Signature, list[Callable[[], None]]] = {}
        self._mutex = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def has_done(self, job: Job) -> bool:
        """Whether a helper over this cache folder has done a job, today or before, here or for another replica."""
        return job.is_done(self._cache)

    def ask(self, key: Signature, job: Job, done: Callable[[], None]) -> None:
        """Have a job done, once whoever asks; `done` is called in the end in any case, in the helper's thread."""
        with self._mutex:
            self._waiting.setdefault(key, []).append(done)
            if len(self._waiting[key]) > 1:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="compile helper", daemon=True)
                self._thread.start()
        self._jobs.put((key, job))

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            thread, process = self._thread, self._process
        if process is not None:
            process.kill()
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    # ---- the helper's thread

    def _serve(self) -> None:
        while True:
            try:
                asked = self._jobs.get(timeout=LINGER_S if self._process is not None else None)
            except queue.Empty:
                self._end()
                continue
            if asked is None:
                self._end()
                return
            key, job = asked
            self._do(job)
            with self._mutex:
                waiting = self._waiting.pop(key)
            for done in waiting:
                done()

    def _do(self, job: Job) -> None:
        try:
            answer = self._exchange(job.to_json())
        except (OSError, ValueError) as error:  # it died, or never started
            answer = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
            self._end()
        if answer["ok"]:
            log.info("compiled", block=job.block, component=job.class_name, seconds=answer["seconds"])
        elif not self._closed:
            log.warning("the helper could not compile; compiling in the sampler", block=job.block,
                        component=job.class_name, reason=answer["reason"])  # fmt: skip

    def _exchange(self, line: str) -> dict[str, object]:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = threading.Timer(JOB_LIMIT_S, process.kill)
        deadline.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer: dict[str, object] = json.loads(process.stdout.readline())
        finally:
            deadline.cancel()
        return answer

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            with self._mutex:
                if self._closed:
                    raise OSError("the sampler stops")
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
        return self._process

    def _end(self) -> None:
        with self._mutex:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:
                pass
