"""Child process of `htp.HtpSession` and `htp.HtpContext` that opens QNN sessions and runs them.

    python -m export.qnn.htp_worker FD

FD is the parent's pipe. The first message is a list of `htp.Job`; each later one is (number of a session, inputs), or
None for the peak memory. Every answer is (error, value).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from export.measure.resources import peak_gb
from export.qnn.htp import Job, Opened

PROVIDER = 'QNNExecutionProvider'


def serve(pipe: Connection) -> None:
    """Open the sessions that the parent requests, then serve run requests; answers are (error, value)."""
    try:
        jobs = pipe.recv()
        start = time.monotonic()
        devices = _register()
        # All sessions stay open: the library holds the shared context until the last one is compiled, and runs need it.
        sessions = [_open(job, devices) for job in jobs]
        pipe.send(('', Opened(time.monotonic() - start, peak_gb())))
        while True:
            pipe.send(('', _value(sessions, pipe.recv())))
    except EOFError:
        return
    except Exception as error:  # the parent reports any error
        pipe.send((' '.join(str(error).split()), None))


def _value(sessions: list[Any], message: Any) -> Any:
    """Return the outputs of a run, (number of a session, inputs), or the peak memory if the message is None."""
    if message is None:
        return peak_gb()
    number, feeds = message
    names = [value.name for value in sessions[number].get_outputs()]
    return dict(zip(names, sessions[number].run(names, feeds), strict=True))


def _register() -> list[Any]:
    """Load QNN, which a process can do once, and return its devices."""
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.set_default_logger_severity(3)  # errors: they name the nodes that QNN refuses
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


def _open(job: Job, devices: list[Any]) -> Any:
    """Open a session on the HTP without any fallback."""
    import onnxruntime
    import onnxruntime_qnn

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry('session.disable_cpu_ep_fallback', '1')
    if job.context:
        settings.add_session_config_entry('ep.context_enable', '1')
        settings.add_session_config_entry('ep.context_embed_mode', '0')
        settings.add_session_config_entry('ep.context_file_path', job.context)
    if job.sharing:
        settings.add_session_config_entry('ep.share_ep_contexts', '1')
    if job.last_sharing:
        settings.add_session_config_entry('ep.stop_share_ep_contexts', '1')
    options = {'backend_path': onnxruntime_qnn.get_qnn_htp_path(), **job.options}
    settings.add_provider_for_devices(devices[:1], options)
    # QNN hashes the given path into graph names: with a bare file name, binaries do not depend on the folder.
    with contextlib.chdir(pathlib.Path(job.model).parent):
        return onnxruntime.InferenceSession(pathlib.Path(job.model).name, sess_options=settings)


if __name__ == '__main__':
    serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    # Skip QNN's clean-up, which can crash after all work is done.
    os._exit(0)
