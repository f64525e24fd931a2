"""Backends that run graphs: ONNX Runtime on the CPU, the HTP of this machine, or the HTP simulator."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from neodragon_phone.bundle import Bundle, version_key
from neodragon_phone.chipsets import find_chipset
from neodragon_phone.errors import BundleError

Arrays = Mapping[str, np.ndarray]
NAMES = ('cpu', 'htp', 'simulator')
_PROVIDER = 'QNNExecutionProvider'


class Backend(Protocol):
    """Opens graphs."""

    def open(self, graphs: Sequence[str]) -> dict[str, Any]:
        """Return an ONNX Runtime session of each graph, which live together."""
        ...


class Session:
    """A graph that is open, with the times of its runs.

    Attributes:
      seconds: of each run.
    """

    def __init__(self, name: str, session: Any, inputs: Mapping[str, Any], outputs: Sequence[str]) -> None:
        self.name, self.seconds = name, list[float]()
        self._session, self._inputs, self._outputs = session, inputs, list(outputs)

    def __call__(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run the graph on float32 inputs of the manifest's shapes; return the outputs by name.

        Raises:
          BundleError: an input is missing or of another shape, or ONNX Runtime fails.
        """
        arrays = {}
        for name, tensor in self._inputs.items():
            if name not in feeds or list(feeds[name].shape) != tensor['shape']:
                got = list(feeds[name].shape) if name in feeds else 'nothing'
                raise BundleError(f'{self.name}: input {name} is {got}, not {tensor["shape"]}. Copy the bundle again.')
            arrays[name] = np.ascontiguousarray(feeds[name], np.float32)
        start = time.perf_counter()
        try:
            outputs = self._session.run(self._outputs, arrays)
        except Exception as error:  # ONNX Runtime raises many kinds
            raise BundleError(f'{self.name}: ONNX Runtime fails: {_one_line(error)}') from None
        self.seconds.append(time.perf_counter() - start)
        return dict(zip(self._outputs, outputs, strict=True))


def check_runtime(bundle: Bundle, packages: Sequence[str], version: Callable[[str], str] | None = None) -> None:
    """Raise BundleError if an installed package is older than the bundle needs.

    Args:
      version: returns the installed version of a package; default: from its metadata.
    """
    version = version or importlib.metadata.version
    for package in packages:
        needed = bundle.manifest['minimum_runtime'].get(package)
        try:
            found = version(package)
        except importlib.metadata.PackageNotFoundError:
            raise BundleError(f'{package}: not installed. Run: pip install {package}') from None
        if needed is not None and version_key(found) < version_key(needed):
            raise BundleError(
                f'{package} {found} is older than {needed}, the lowest that plays the bundle. '
                f'Run: pip install "{package}>={needed}"'
            )


def check_sdk(bundle: Bundle, found: str) -> None:
    """Raise BundleError if QNN's SDK is older than the one that compiled the binaries of the bundle's place.

    Args:
      found: version of the SDK whose libraries are installed.
    """
    for binary in bundle.manifest['binaries']:
        needed = binary.get('qnn_sdk')  # older bundles tell only the version of onnxruntime-qnn
        if binary['chipset'] == bundle.place and needed and version_key(found)[:3] < version_key(needed)[:3]:
            raise BundleError(
                f'QNN SDK {found} is older than {binary["file"]}, compiled with {needed}. '
                'Run: pip install --upgrade onnxruntime-qnn'
            )


def _installed_sdk() -> str:
    """Return the version of the QNN SDK whose libraries onnxruntime-qnn has."""
    from onnxruntime_qnn import build_and_package_info  # pyright: ignore[reportMissingImports]

    return build_and_package_info.qnn_version


def open_backend(name: str, bundle: Bundle, chipset: str | None) -> Backend:
    """Return a backend for a bundle.

    Args:
      name: of NAMES.
      chipset: to simulate; None takes the bundle's first.
    Raises:
      BundleError: the runtime is missing or older than the bundle, or the bundle has no such chipset.
    """
    check_runtime(bundle, ['onnxruntime'] if name == 'cpu' else ['onnxruntime', 'onnxruntime-qnn'])
    if name == 'cpu':
        return CpuBackend(bundle)
    if name == 'htp':
        check_sdk(bundle, _installed_sdk())
        return HtpBackend(bundle)
    return SimulatorBackend(bundle, _simulated_chipset(bundle, chipset))


def _simulated_chipset(bundle: Bundle, chipset: str | None) -> str:
    """Return the given chipset, or the bundle's first for None; raise BundleError if the bundle has no such chipset."""
    known = bundle.manifest['chipsets']
    if not known:
        raise BundleError('the bundle names no chipset; use --backend cpu.')
    chosen = next(iter(known)) if chipset is None else find_chipset(known, chipset)
    if chosen is None:
        raise BundleError(f'--chipset {chipset}: the bundle is for {", ".join(known)}.')
    return chosen


class CpuBackend:
    """Portable graphs on ONNX Runtime's CPU provider."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def open(self, graphs: Sequence[str]) -> dict[str, Any]:
        """Return a session of each graph."""
        import onnxruntime

        return {
            name: _session(name, onnxruntime.SessionOptions(), _portable(self._bundle, name), ['CPUExecutionProvider'])
            for name in graphs
        }


class SimulatorBackend:
    """Portable graphs, compiled when they are opened, on the HTP simulator of onnxruntime-qnn for x86 Linux."""

    def __init__(self, bundle: Bundle, chipset: str) -> None:
        self._bundle, self._devices = bundle, _qnn_devices()
        entry = bundle.manifest['chipsets'][chipset]
        self._options = {'soc_model': str(entry['soc_model']), 'htp_arch': str(entry['htp_arch'])}

    def open(self, graphs: Sequence[str]) -> dict[str, Any]:
        """Compile each graph; return the sessions."""
        sessions = {}
        for name in graphs:
            half = self._bundle.manifest['graphs'][name]['precision'] == 'fp16'
            options = self._options | ({'enable_htp_fp16_precision': '1'} if half else {})
            settings = _qnn_settings(self._devices, options, {'session.disable_cpu_ep_fallback': '1'})
            sessions[name] = _session(name, settings, _portable(self._bundle, name))
        return sessions


class HtpBackend:
    """Context binaries on the HTP of this machine; graphs that share a binary share its memory."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._devices = bundle, _qnn_devices()
        self._binaries = [entry for entry in bundle.manifest['binaries'] if entry['chipset'] == bundle.place]

    def open(self, graphs: Sequence[str]) -> dict[str, Any]:
        """Load the binaries of the graphs; return the sessions.

        Raises:
          BundleError: a graph has no binary, or the HTP does not load one.
        """
        sessions = {}
        for binary in self._binaries:
            names = [name for name in binary['graphs'] if name in graphs]
            for name in names:
                entries = dict(binary['session_options'])
                if 'ep.share_ep_contexts' in entries and name == names[-1]:
                    entries['ep.stop_share_ep_contexts'] = '1'
                settings = _qnn_settings(self._devices, binary['provider_options'], entries)
                wrapper = self._bundle.path(binary['graphs'][name]['wrapper'])
                sessions[name] = _session(name, settings, wrapper)
        missing = [name for name in graphs if name not in sessions]
        if missing:
            raise BundleError(
                f'{missing[0]}: the bundle has no binary of it for {self._bundle.place}. Export it again.'
            )
        return sessions


def exit_process(status: int) -> None:
    """End the process; with QNN loaded at once, because the clean-up of its simulator can crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    if 'onnxruntime_qnn' in sys.modules:
        os._exit(status)
    sys.exit(status)


def _portable(bundle: Bundle, name: str) -> Any:
    """Return the ONNX file of a graph."""
    return bundle.path(bundle.manifest['graphs'][name]['portable'][0])


def _qnn_devices() -> list[Any]:
    """Register QNN with ONNX Runtime, once per process, and return its devices."""
    import onnxruntime
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    devices = lambda: [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]
    if not devices():
        onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    if not devices():
        raise BundleError('onnxruntime-qnn finds no HTP on this machine; use --backend cpu.')
    return devices()


def _qnn_settings(devices: Sequence[Any], options: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """Return session options that run a graph wholly on the HTP."""
    import onnxruntime
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    settings = onnxruntime.SessionOptions()
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    backend = {'backend_path': onnxruntime_qnn.get_qnn_htp_path()}
    settings.add_provider_for_devices(list(devices[:1]), backend | dict(options))
    return settings


def _session(name: str, settings: Any, path: Any, providers: list[str] | None = None) -> Any:
    """Return an ONNX Runtime session, or raise BundleError."""
    import onnxruntime

    settings.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, sess_options=settings, providers=providers)
    except Exception as error:  # ONNX Runtime raises many kinds
        raise BundleError(f'{name}: ONNX Runtime does not load it: {_one_line(error)}') from None


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300]
