"""Convert the published LPIPS weights to the file that the VAE trainings read; PyTorch is not needed.

    pip download --no-deps lpips==0.1.4
    curl -O https://download.pytorch.org/models/vgg16-397923af.pth
    python -m train.lpips_weights --linear lpips-0.1.4-py3-none-any.whl --backbone vgg16-397923af.pth \
        --out lpips_vgg.safetensors

LPIPS has two parts. The weights of the features are in the `lpips` package (version 0.1 of the metric, 7 KB). The
backbone that makes the features is torchvision's VGG16 or AlexNet, trained on ImageNet; PyTorch hosts it as
`vgg16-397923af.pth` (553 MB) or `alexnet-owt-7be5be79.pth` (244 MB), under its own terms.

Source: LPIPS 0.1, arXiv 1801.03924.
"""

from __future__ import annotations

import pathlib
import sys
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy

from neodragon_jax.base.atomic import atomic_file, check_file_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from train.vae.perceptual import NETWORKS, tensor_names
from train.vae.torch_file import parse_torch, read_torch

EXAMPLES = """
example:
  pip download --no-deps lpips==0.1.4
  curl -O https://download.pytorch.org/models/vgg16-397923af.pth
  python -m train.lpips_weights --linear lpips-0.1.4-py3-none-any.whl --backbone vgg16-397923af.pth \\
      --out lpips_vgg.safetensors

For AlexNet, the backbone is https://download.pytorch.org/models/alexnet-owt-7be5be79.pth.
"""
# The weights of the features in the package's wheel.
IN_WHEEL = 'lpips/weights/v0.1/{network}.pth'


def convert(
    backbone: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray], network: str
) -> dict[str, np.ndarray]:
    """Return all tensors of LPIPS under the names that `train.vae.perceptual` reads.

    Raises:
      InputError: a tensor is missing.
    """
    tensors = {}
    for name in tensor_names(network):
        # net.slice2.5.weight is torchvision's features.5.weight.
        source, given, option = name, linear, '--linear'
        if name.startswith('net.'):
            source, given, option = f'features.{name.split(".", 2)[2]}', backbone, '--backbone'
        if source not in given:
            raise InputError(f'{option}: has no tensor {source}, which LPIPS by {network} needs; see --help.')
        tensors[name] = np.ascontiguousarray(given[source], np.float32)
    return tensors


def network_of(backbone: Mapping[str, np.ndarray]) -> str:
    """Return the name of the network that has the convolutions of a backbone.

    Raises:
      InputError: there is none.
    """
    convolutions = lambda names: {name for name in names if name.endswith('weight')}
    given = convolutions(name for name in backbone if name.startswith('features.'))
    for network in NETWORKS:
        named = (name for name in tensor_names(network) if name.startswith('net.'))
        if given == convolutions(f'features.{name.split(".", 2)[2]}' for name in named):
            return network
    raise InputError('--backbone: neither VGG16 nor AlexNet of torchvision; see --help for the files.')


def read_linear(path: pathlib.Path, network: str) -> dict[str, np.ndarray]:
    """Return the weights of the features, from the package's wheel or from its file for a network.

    Raises:
      InputError: the file is missing, damaged or something else.
    """
    if path.suffix != '.whl':
        return read_torch(path, '--linear')
    member = IN_WHEEL.format(network=network)
    try:
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(member)
    except FileNotFoundError:
        raise InputError(f'--linear {path}: no such file. Run: pip download --no-deps lpips==0.1.4') from None
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f'--linear {path}: not the wheel of lpips 0.1.4 ({error}); download it again.') from None
    return parse_torch(content, f'--linear {path}: {member}')


def run(argv: Sequence[str] | None = None) -> None:
    """Convert the files of a command line."""
    description = 'Convert the published LPIPS weights to the file that train.autoencoder and train.decoder read.'
    parser = command_parser('python -m train.lpips_weights', description, EXAMPLES)
    add = parser.add_argument
    add('--linear', action=PathOption, required=True, metavar='FILE',
        help='wheel of the lpips package, or its weights/v0.1/vgg.pth')  # fmt: skip
    add('--backbone', action=PathOption, required=True, metavar='FILE', help="torchvision's VGG16 or AlexNet, a .pth")
    add('--out', action=PathOption, required=True, metavar='FILE', help='safetensors file to write')
    args = parser.parse_args(argv)
    check_file_writable(args.out, '.safetensors')
    backbone = read_torch(args.backbone, '--backbone')
    network = network_of(backbone)
    tensors = convert(backbone, read_linear(args.linear, network), network)
    with atomic_file(args.out) as partial:
        safetensors.numpy.save_file(tensors, partial)
    print(f'{args.out}: LPIPS by {network}, {len(tensors)} tensors')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == '__main__':
    sys.exit(main())
