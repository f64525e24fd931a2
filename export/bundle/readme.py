"""README.md of a bundle, for the engineer who integrates it into an app."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

_TEXT = string.Template("""\
# $name: text to video on a Snapdragon HTP

A prompt becomes $frames frames of ${width}x$height at $rate per second. This folder has everything for that: graphs,
embedding tables, tokenizers, schedules, test vectors. `manifest.json` describes each file and tensor; the format is
documented in docs/bundle.md of the project.

## Try it

    pip install export/player        # of the project: the package neodragon-phone
    python -m neodragon_phone . --prompt "$example" --out video.mp4

runs the portable graphs on the CPU. With `pip install "export/player[qnn]"`, `--backend htp` runs the context
binaries on a Snapdragon machine, and `--backend simulator` the HTP simulator on x86 Linux. `--canary video` without
`--prompt` checks a machine: every graph and one whole video are compared with recorded results.

## Data flow

$flow

The rest is arithmetic on small arrays: indexing tables, halving and doubling grids, adding noise. All of it is
specified in docs/bundle.md. The player in Python (NumPy) has it all, for laptops and servers. Denoiser, decoder and
super-resolution are also in C++ on ONNX Runtime's C API, for an app to call through JNI (export/player/cpp);
"In an Android app" in docs/bundle.md says what else an app needs.

## The loop

    prompt   = text graphs (tokens + tables)                         once
    m[s]     = denoiser_modulation(sinusoid[s], pooled)              once per stage and step
    for unit u = $first_unit .. $last_unit:
      x = noise(seed, u), at the size of stage 0
      for stage s = 0 .. $last_stage:
        if s > 0: x = alpha[s] up(x) + beta[s] block_noise(seed, u, s)
        history = patches of earlier units, coarser with distance
        flow = denoiser_stage{s}([history, x], prompt, tables[u][s], m[s])
        x = x + (next_level - level) flow
      latent[u] = x
    for u = 0 .. $last_unit:
      frames, memories = video_decoder(denormalize(latent[u]), memories)

## Graphs

$graphs

## Memory

Phases run one after the other. Load the graphs of a phase, run them, release them. A phase takes the bytes of its
files and of the inputs and outputs of its graphs. $memory

$phases

## Before you ship

1. Compare every file with the hashes in `manifest.json` when it arrives on the device.
2. Check the chipset ($chipsets) and the runtime ($runtime, or newer): a binary of another chip or for a newer SDK
   fails late or not at all. The version of QNN's libraries is that of their SDK, not that of ONNX Runtime.
3. Run the recorded calls once on each device model. An SNR (signal-to-noise ratio, against JAX) below `minimum_db`
   means that this runtime computes something else; do not use its results.
4. Graphs that share a binary need one process and the session options in `binaries`.
5. Measure load time and run time apart; report the median of several runs and the thermal state.
6. $safety

## License

$license
""")


def readme(manifest: Mapping[str, Any]) -> str:
    """Return the README text for a manifest."""
    video, denoiser = manifest['video'], manifest['denoiser']
    return _TEXT.substitute(
        name=manifest['name'],
        **{key: video[key] for key in ('frames', 'height', 'width')},
        rate=video['frames_per_second'],
        example=video['example'] or 'a red fox trots through fresh snow',
        flow=_flow(manifest),
        first_unit=denoiser['first_unit'],
        last_unit=video['latent_frames'] - 1,
        last_stage=len(denoiser['stages']) - 1,
        graphs=_graphs(manifest),
        memory=memory_line(manifest['memory']),
        phases=_phases(manifest),
        chipsets=', '.join(f'{name}: {entry["product"]}' for name, entry in manifest['chipsets'].items()),
        runtime=', '.join(_versions(manifest)),
        safety=_safety(manifest['safety']),
        license='\n'.join(f'* {part}: {text}' for part, text in manifest['license'].items()),
    )


def _safety(safety: Mapping[str, Any]) -> str:
    """Return the item on unsafe content."""
    if safety['checkpoint_has_checker']:
        lines = ('Videos are not checked for unsafe content. The checkpoint has a safety checker, which makes refused',
                 'frames black in JAX; it is not part of the bundle.')  # fmt: skip
    else:
        lines = ('Videos are not checked for unsafe content, and the checkpoint has no safety checker.',)
    return '\n   '.join((*lines, 'Check prompts and frames in your app.'))


def _versions(manifest: Mapping[str, Any]) -> list[str]:
    """Return the lowest versions of the runtime, with that of QNN's SDK for the binaries."""
    packages = [f'{name} {version}' for name, version in manifest['minimum_runtime'].items()]
    return packages + [f'QNN SDK {version}' for version in sorted({entry['qnn_sdk'] for entry in manifest['binaries']})]


def _flow(manifest: Mapping[str, Any]) -> str:
    """Return the diagram of data flow."""
    lines = [
        '    prompt --+--> clip_l, clip_g --> pooled --> denoiser_modulation --+',
        '             |                                                         v',
        '             +--> dt5 --> context_adapter --> text ------------> denoiser_stage0, 1, 2 --> latents',
        '             |                                                         ^                      |',
    ]
    if manifest['first_frame'] is not None:
        lines += [
            '             +--> first_frame_clip_l, _g --> first_frame_unet          |                      |',
            '                      --> first_frame_decoder --> video_encoder -------+                      |',
        ]
    lines += [
        '    seed ----+--> noise -----------------------------------------------+                      v',
        '                                                                 frames <-- video_decoder, one latent a call',
    ]
    return '\n'.join(lines)


def _graphs(manifest: Mapping[str, Any]) -> str:
    """Return the table of graphs."""
    lines = ['| graph | precision | inputs | outputs | CPU against JAX |', '|---|---|---|---|---|']
    for name, graph in manifest['graphs'].items():
        tensors = [_tensors(graph[kind]) for kind in ('inputs', 'outputs')]
        lines.append(
            f'| {name} | {graph["precision"]} | {tensors[0]} | {tensors[1]} | {graph["vector"]["cpu_db"]} dB |'
        )
    return '\n'.join(lines)


def _tensors(tensors: Mapping[str, Any]) -> str:
    """Return names and shapes of the first three tensors, and the number of further ones."""
    shown = [f'`{name}` {"x".join(map(str, entry["shape"]))}' for name, entry in tensors.items()]
    return ', '.join(shown[:3]) + (f' and {len(shown) - 3} more' if len(shown) > 3 else '')


def memory_line(memory: Mapping[str, Any]) -> str:
    """Return a sentence on the largest phase of each place; a phase above the budget is named so."""
    parts = [
        f'on {place} "{entry["phase"]}" with {entry["bytes"] / 1e6:,.0f} MB'
        + ' (ABOVE the budget)' * (entry['bytes'] > memory['budget'])
        for place, entry in memory['largest'].items()
    ]
    return f'The budget of a phase is {memory["budget"] / 1e6:,.0f} MB. The largest is {", ".join(parts)}.'


def _phases(manifest: Mapping[str, Any]) -> str:
    """Return the table of memory by phase."""
    places = ['portable', *manifest['chipsets']]
    lines = [f'| phase | graphs | {" | ".join(f"{place} MB" for place in places)} |', '|---' * (2 + len(places)) + '|']
    for phase in manifest['phases']:
        sizes = ' | '.join(f'{phase["bytes"][place] / 1e6:,.0f}' for place in places)
        lines.append(f'| {phase["name"]} | {", ".join(phase["graphs"])} | {sizes} |')
    return '\n'.join(lines)
