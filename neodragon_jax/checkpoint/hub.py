"""Checkpoints by their name on the Hugging Face hub: `hf://ORG/NAME@REVISION`, or `ORG/NAME`.

Files are stored in the cache of the hub's library (HF_HOME); complete files are not downloaded again. A revision is
resolved once per process; the name of the returned folder is the commit.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import folders, model_card

# Small files beside the component folders, which are always downloaded.
ROOT_FILES = ('generation.json', '*_prompts.txt', model_card.RECORD, model_card.CARD, 'LICENSE*')
_NAME = re.compile(r'(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?')
# pathlib merges two slashes into one.
_SCHEME = re.compile('hf://?', re.IGNORECASE)
# Resolved commit of each name fetched by this process, so that all files come from the same commit.
_COMMITS: dict[HubName, str] = {}


class HubName(NamedTuple):
    """Repository of the hub, with a branch, tag or commit; None is the newest commit."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f'hf://{self.repository}' + (f'@{self.revision}' if self.revision else '')


def is_explicit(text: str) -> bool:
    """Return whether a text is unambiguously a hub name."""
    return _SCHEME.match(text) is not None


def parse(text: str) -> HubName | None:
    """Parse a hub name; return None if the text cannot be one."""
    match = _NAME.fullmatch(_SCHEME.sub('hf://', text, count=1))
    return None if match is None else HubName(match[1], match[2])


def needed_folders(mode: str, first_frame: str) -> tuple[str, ...]:
    """Return the folders of a checkpoint that one mode of generation reads.

    Args:
      mode: 'hybrid' or 'monolithic'.
      first_frame: source of the first frame: 'model' needs the first-frame model, 'denoiser' no further folder.
    """
    drawn = mode == 'hybrid' and first_frame == 'model'
    return (
        *folders.TOKENIZERS,
        *(folders.CLIP_L, folders.CLIP_G, folders.T5, folders.VIDEO_VAE),
        *(folders.DENOISER_FOLDERS[mode], folders.ADAPTER_FOLDERS[mode]),
        *(folders.SAFETY_CHECKER, folders.FEATURE_EXTRACTOR),
        *(folders.FIRST_FRAME_TOKENIZERS if drawn else ()),
        *((folders.FIRST_FRAME_CLIP_L, folders.FIRST_FRAME_CLIP_G) if drawn else ()),
        *((folders.FIRST_FRAME_UNET, folders.FIRST_FRAME_VAE) if drawn else ()),
    )


def fetch(name: HubName, needed: Sequence[str] | None, option: str) -> pathlib.Path:
    """Return the local folder of a repository, after downloading the files that are missing.

    Args:
      needed: component folders to download; None downloads all of the repository.
      option: the option that names it, for messages.
    Raises:
      InputError: the hub cannot be reached and the files are not in the cache; or the name or the revision is unknown,
        or the repository is private or gated.
    """
    import huggingface_hub

    patterns = None if needed is None else [*ROOT_FILES, *(f'{folder}/*' for folder in needed)]
    with _one_line(name, option):
        # A separate request, because a download reports an unknown name and a lost connection alike.
        if not _offline() and name not in _COMMITS:
            huggingface_hub.HfApi().model_info(name.repository, revision=name.revision)
        root = huggingface_hub.snapshot_download(
            name.repository,
            revision=_COMMITS.get(name, name.revision),
            allow_patterns=patterns,
            local_files_only=_offline(),
        )
    _COMMITS[name] = pathlib.Path(root).name
    return pathlib.Path(root)


def upload_student(folder: pathlib.Path, name: HubName, card: str, private: bool) -> str:
    """Upload a student's folders, its record and its card as one commit; return the commit.

    Args:
      folder: holds the denoiser, its context adapter and `student.json`.
      card: content of README.md.
      private: whether a new repository is private.
    Raises:
      InputError: the hub cannot be reached, or does not accept the upload.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    add = huggingface_hub.CommitOperationAdd
    paths = [path for part in (folders.STUDENT, folders.STUDENT_ADAPTER) for path in sorted((folder / part).iterdir())]
    files = [path for path in (*paths, folder / model_card.RECORD) if path.is_file() and not path.name.startswith('.')]
    operations = [add(path.relative_to(folder).as_posix(), str(path)) for path in files]
    operations.append(add(model_card.CARD, card.encode()))
    with _one_line(name, option='--to'):
        api.create_repo(name.repository, private=private, exist_ok=True)
        done = api.create_commit(name.repository, operations, commit_message='Upload a distilled student')
    return done.oid


def _offline() -> bool:
    """Return whether the user has asked the hub's library to stay offline."""
    return os.environ.get('HF_HUB_OFFLINE', '').strip().upper() in ('1', 'ON', 'YES', 'TRUE')


@contextmanager
def _one_line(name: HubName, option: str) -> Iterator[None]:
    """Turn the errors of the hub's library into one line with the remedy."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a repository without generation.json is no reason to warn
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f'{option} {name}: the repository is gated. Accept its terms at '
            f'https://huggingface.co/{name.repository}, then log in: hf auth login.'
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f'{option} {name}: no such revision. Give a branch, a tag or a commit of {name.repository}, or none.'
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f'{option} {name}: no such repository on the hub, or a private one. Correct the name, or log in: hf '
            'auth login.'
        ) from None
    except errors.HFValidationError:
        raise InputError(f'{option} {name}: not a name of the hub; write hf://ORG/NAME@REVISION.') from None
    except errors.LocalEntryNotFoundError:
        raise InputError(_unreachable(name, option)) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, 'status_code', None)
        if status in (401, 403):
            raise InputError(f'{option} {name}: the hub refuses access; log in with a token: hf auth login.') from None
        raise InputError(f'{option} {name}: the hub answers with status {status}; try again later.') from None
    except (errors.HTTPError, ConnectionError, TimeoutError):
        raise InputError(_unreachable(name, option)) from None
    finally:
        logging.set_verbosity(verbosity)


def _unreachable(name: HubName, option: str) -> str:
    return (
        f'{option} {name}: the hub cannot be reached, and the files are not all in the cache. Try again when '
        'online (complete files are kept), or pass a folder.'
    )
