"""Calibrated profiles in the user's cache folder: one JSON file per machine, never trusted.

Reading refuses what another user could have written and whatever is not a valid profile of this machine;
nothing that is wrong with the cache is an error, it costs a line in the log and a new measurement.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

from hetegen_compile.calibration.machine import Machine
from hetegen_compile.cost_model import HardwareProfile, load_profile, profile_to_json
from hetegen_compile.errors import HardwareProfileError
from hetegen_compile.files import write_private

logger = logging.getLogger("hetegen_compile")


def cache_path(machine: Machine) -> Path | None:
    """Where the profile of this machine is kept; None if the user has no home folder.

    ``$XDG_CACHE_HOME/hetegen/profiles``, by default ``~/.cache/hetegen/profiles``; a relative
    ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory specification demands.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        home = Path(os.path.expanduser("~"))
        if not (home.is_absolute() and home.is_dir()):  # as of services' users: not ours to make
            return None
        base = home / ".cache"
    return base / "hetegen" / "profiles" / f"{machine.key}.json"


def read_profile(path: Path, machine: Machine) -> HardwareProfile | None:
    """The profile in the file if it is a valid one of this machine, else None.

    A missing file is silent; any other reason is one line at WARNING.
    """
    try:
        _check_owner(path)
        profile = load_profile(str(path))
        if profile.name != machine.profile_name:
            raise HardwareProfileError(f"hardware profile '{path}' was measured on another machine")
    except FileNotFoundError:
        return None
    except (OSError, HardwareProfileError) as error:
        logger.warning("the cached profile is not used and will be measured anew: %s", error)
        return None
    return profile


def write_profile(path: Path | None, profile: HardwareProfile) -> bool:
    """Keep the profile: a temporary file in the same folder, then renamed. Readable for the user only.

    Returns False, with one line at WARNING, if it cannot be written.
    """
    if path is None:
        logger.warning("the profile is used but not cached: there is no home folder")
        return False
    try:
        _make_private(path.parent)
        write_private(path, json.dumps(profile_to_json(profile), indent=2) + "\n")
    except OSError as error:
        logger.warning("the profile is used but not cached: %s", error)
        return False
    return True


def _check_owner(path: Path) -> None:
    """Raises OSError, HardwareProfileError if the file is no ordinary one that only this user can write."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise HardwareProfileError(f"'{path}' is not a regular file")
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HardwareProfileError(f"'{path}' belongs to another user or can be written by one")


def _make_private(folder: Path) -> None:
    """The folder, the one above it and whatever is missing above that, for this user only."""
    missing = [place for place in folder.parents if not place.exists()]
    for place in (*reversed(missing), folder):
        place.mkdir(mode=0o700, exist_ok=True)
    for place in (folder.parent, folder):
        place.chmod(0o700)
