"""The colours of figures: each stands for a variable of the page, with a light and a dark value (style.css)."""

INK, SOFT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0a0a0{i}" for i in range(8)]
HEAT = [f"#0b0b{i:02x}" for i in range(16)]  # from little to much
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"}
VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"heat-{i}" for i, colour in enumerate(HEAT)}
DASHED = (0, (4, 3))


def heat_colour(value: float, low: float, high: float) -> str:
    """The colour of a value between these."""
    share = (value - low) / (high - low) if high > low else 0.0
    return HEAT[min(int(max(share, 0.0) * len(HEAT)), len(HEAT) - 1)]
