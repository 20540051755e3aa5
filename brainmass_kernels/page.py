"""A figure that a notebook shows, whether or not the user has imported pyplot.

Imported only where something is drawn: it needs matplotlib.
"""

from __future__ import annotations

import io

import matplotlib.figure

#: Dots per inch of a notebook's page.
_SCREEN = 100.0


class Figure(matplotlib.figure.Figure):
    """A matplotlib ``Figure`` outside of pyplot, which is drawn on Agg and does not change the user's backend.

    IPython draws figures only after pyplot was imported; otherwise it asks for `_repr_png_`.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """A picture, and the size at which it is shown."""
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        width, height = (round(inches * _SCREEN) for inches in self.get_size_inches())
        return picture.getvalue(), {"width": width, "height": height}
