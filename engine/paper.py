"""Numbers of the paper, arXiv 2602.23008. Scores are -100...100."""

# Table 1 (§5), tip-free, in its order of rows and columns.
COLUMNS = ("base", "Reflexion", "Retrospex", "GRPO", "EMPO²")
TABLE_1 = {
    "chemistry-mix": (-42.0, 1.2, 20.8, 12.4, 42.7),
    "chemistry-mix-paint-secondary-color": (-33.0, 0.0, 27.8, 7.1, 33.3),
    "chemistry-mix-paint-tertiary-color": (-33.9, 36.9, 7.6, 42.6, 39.2),
    "find-animal": (-58.2, 39.5, 25.9, 72.4, 100.0),
    "find-living-thing": (-65.1, 36.6, 20.6, 68.7, 100.0),
    "find-non-living-thing": (-35.9, 4.8, 89.1, 24.7, 100.0),
    "find-plant": (-47.1, 15.1, 23.0, 46.2, 100.0),
    "identify-life-stages-1": (-48.9, 9.2, 19.0, 17.9, 36.2),
    "identify-life-stages-2": (-50.7, 33.8, 11.0, 39.5, 56.3),
    "lifespan-longest-lived": (-51.8, 44.6, 55.0, 78.2, 100.0),
    "lifespan-longest-lived-then-shortest-lived": (-56.2, 34.1, 38.0, 62.3, 100.0),
    "lifespan-shortest-lived": (-56.8, 6.1, 67.0, 20.6, 100.0),
    "power-component": (-90.0, 6.3, 8.2, 15.1, 94.3),
    "power-component-renewable-vs-nonrenewable-energy": (-85.0, 11.7, 10.0, 24.6, 92.6),
    "test-conductivity": (-86.9, 13.2, 60.0, 27.8, 89.5),
    "test-conductivity-of-unknown-substances": (-81.7, 2.6, 65.5, 9.5, 71.4),
    "measure-melting-point-known-substance": (-97.5, 11.4, 26.5, 19.8, 27.6),
    "use-thermometer": (-83.7, 0.9, 32.5, 7.6, 82.7),
}

# WebShop (§5), full data: score and success in percent. "GiGPO, std" is from GiGPO's paper.
WEBSHOP = {
    "base": (26.4, 7.8),
    "Reflexion": (58.1, 28.8),
    "Retrospex": (73.1, 60.4),
    "GRPO": (79.3, 66.1),
    "GiGPO": (86.2, 75.2),
    "GiGPO, std": (84.4, 72.8),
    "EMPO²": (88.3, 76.9),
}

# §6.1, new tasks: (the task it was trained on, best trial of EMPO², best trial of GRPO)
OOD = {
    "lifespan-shortest-lived": ("identify-life-stages-2", 32.3, -6.2),
    "test-conductivity": ("lifespan-longest-lived", 88.1, 22.5),
    "chemistry-mix-paint-secondary-color": ("power-component", 18.9, -21.4),
}
