"""Where the time from the start of a command to its first training step goes."""

import time

COMPILATION = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from what earlier processes kept."""


class Startup:
    """A clock of the phases before the first step is done."""

    def __init__(self):
        """Starts the clock; imports nothing heavy."""
        self._begin = self._last = time.monotonic()
        self._phases: dict[str, float] = {}
        self._compiling = 0.0

    def watch_compilations(self) -> None:
        """Lets JAX tell how long it compiles, from now on."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILATION:
            self._compiling += duration_secs

    def ends(self, phase: str) -> None:
        """Ends a phase, which began where the one before ended."""
        now = time.monotonic()
        self._phases[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items())
        return (
            f"first step done after {self._last - self._begin:.1f} s: {phases}; "
            f"of these, compiling {self._compiling:.1f}"
        )
