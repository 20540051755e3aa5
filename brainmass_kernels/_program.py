"""First of all imports: a command line that is interrupted in those that take seconds ends at once, with 130."""

import os
import signal
import sys
from types import FrameType


def stop(number: int, _: FrameType | None) -> None:
    """End the process; nothing has been begun that could be left half done."""
    os._exit(128 + number)


def is_ours() -> bool:
    """Whether the process is ``brainmass-kernels`` or ``python -m brainmass_kernels.cli``."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":
        return "brainmass_kernels.cli" in sys.orig_argv
    return os.path.basename(name) in ("brainmass-kernels", "brainmass-kernels.exe")


#: Asked once: ``-m`` is gone from the arguments when the program runs.
OURS = is_ours()

if OURS:
    for _number, _usual in {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}.items():
        if signal.getsignal(_number) == _usual:
            signal.signal(_number, stop)
