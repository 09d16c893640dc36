"""The colours of figures. Each stands for a variable of the page, which has a light and a dark value (style.css)."""

INK, SOFT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0a0a0{i}" for i in range(8)]
HEAT = [f"#0b0b{i:02x}" for i in range(16)]  # from little to much
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"}
VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"heat-{i}" for i, colour in enumerate(HEAT)}
