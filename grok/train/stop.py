"""How a run is asked to stop."""

import os
import signal


class StopRequest:
    """Notices SIGINT and SIGTERM: the first asks the loop to save and leave after the running
    step, the second ends the process at once."""

    def __init__(self) -> None:
        self._requested = False

    def requested(self) -> bool:
        """Whether someone has asked the run to stop."""
        return self._requested

    def __enter__(self) -> "StopRequest":
        self._before = {
            number: signal.signal(number, self._notice)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: object) -> None:
        self._requested = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
